// Sort and filter the table of claims. Without this script the table is whole and in its own order.
"use strict";
(() => {
  const table = document.getElementById("claims");
  const form = document.getElementById("filters");
  const body = table.tBodies[0];
  const rows = [...body.rows];

  const filter = () => {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = ["paper", "verdict", "reading"].every(
        (name) => !form.elements[name].value || row.dataset[name] === form.elements[name].value,
      );
      const text = row.textContent.toLowerCase();
      row.hidden = !(fits && words.every((word) => text.includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} claims`;
  };

  const value = (row, column) => row.cells[column].dataset.order ?? row.cells[column].textContent.trim();
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      const compare = (a, b) => down * value(a, column).localeCompare(value(b, column), "en", { numeric: true });
      body.append(...[...rows].sort(compare));
    });
  });

  // A link to one claim shows it, whatever is filtered.
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
