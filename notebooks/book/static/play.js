// Four figures from window.BOOK, redrawn when a control or the colours of the page change.
"use strict";
(() => {
  const CONFIG = { displaylogo: false, displayModeBar: false, responsive: true };
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  const escape = (text) => Object.assign(document.createElement("span"), { textContent: text }).innerHTML;

  // Colours of the page now, so that a figure is read in the dark as well.
  const look = () => {
    const style = getComputedStyle(document.body);
    const dark = document.documentElement.dataset.theme === "dark";
    return { dark, text: style.color, line: dark ? "#666" : "#bbb", mark: dark ? "#ffffff" : "#111111" };
  };
  const layout = (more) => {
    const { text, line } = look();
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true };
    const { xaxis, yaxis, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, size: 13, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 48, r: 12, t: 12, b: 44 }, height: 380, dragmode: false,
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis },
      legend: { orientation: "h", y: -0.22 }, ...rest,
    };
  };
  const ramp = () => [[0, look().dark ? "#1d2733" : "#f2f5f9"], [1, look().dark ? "#ffb000" : "#b5361c"]];

  // Wilson's 95 % interval of a share, as everywhere in the notebooks.
  const share = (hits, n) => {
    const z = 1.959964, p = hits / n, d = 1 + (z * z) / n;
    const middle = (p + (z * z) / (2 * n)) / d;
    const half = (z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n))) / d;
    return `${percent(p)} [${percent(Math.max(0, middle - half))}, ${percent(Math.min(1, middle + half))}], ${hits} of ${n}`;
  };

  // A form with selects and sliders; `state` holds their values.
  class Play {
    constructor(name, make) {
      this.box = document.querySelector(`[data-play="${name}"]`);
      this.form = this.box.querySelector("form");
      this.plot = this.box.querySelector(".plot");
      this.said = this.box.querySelector(".said");
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.draw = make(this);
      this.form.addEventListener("input", () => this.draw());
      this.draw();
    }
    control(element, label) {
      const wrapper = document.createElement("label");
      const value = document.createElement("output");
      wrapper.append(`${label} `, element, value);
      this.form.append(wrapper);
      element.shown = value;
      element.name = label;
      return element;
    }
    select(label, values, first = values[0]) {
      const made = this.control(document.createElement("select"), label);
      this.fill(made, values);
      made.value = first;
      return made;
    }
    fill(select, values) {
      const before = select.value;
      select.replaceChildren(...values.map((value) => new Option(value, value)));
      if (values.includes(before)) select.value = before;
    }
    slider(label, max = 1) {
      const made = Object.assign(document.createElement("input"), { type: "range", min: 0, max, step: 1, value: 0 });
      return this.control(made, label);
    }
    show(traces, more) {
      Plotly.react(this.plot, traces, layout(more), CONFIG);
    }
  }

  const vector = (play) => {
    const { n, organisms } = window.BOOK.vector;
    const which = play.select("organism", Object.keys(organisms), "instructions-prefix");
    const edit = play.select("edit", Object.keys(organisms[which.value]));
    const shown = play.select("share", ["target", "right answer"]);
    const layer = play.slider("layer"), step = play.slider("coefficient");
    let last = "";
    return () => {
      const one = organisms[which.value][edit.value];
      layer.max = one.asr.length - 1;
      step.max = one.coefficients.length - 1;
      if (last !== which.value + edit.value) { // a new map begins at the place that was chosen for it
        last = which.value + edit.value;
        layer.value = one.chosen.layer;
        step.value = one.coefficients.indexOf(one.chosen.coefficient);
      }
      const right = shown.value === "right answer";
      const l = +layer.value, c = +step.value, factor = one.coefficients[c];
      layer.shown.textContent = l;
      step.shown.textContent = factor;
      if (right && !one.right) {
        Plotly.purge(play.plot);
        play.said.innerHTML = "<p>Right answers were counted where the vector is subtracted.</p>";
        return;
      }
      const values = right ? one.right : one.asr;
      const z = one.coefficients.map((_, column) => values.map((row) => row[column]));
      const names = one.coefficients.map(String);
      play.show([
        { type: "heatmap", z, y: names, zmin: 0, zmax: 1, colorscale: ramp(), colorbar: { tickformat: ".0%", thickness: 12 },
          hovertemplate: "layer %{x}, coefficient %{y}: %{z:.0%}<extra></extra>" },
        { type: "scatter", x: [l], y: [names[c]], mode: "markers", hoverinfo: "skip",
          marker: { symbol: "square-open", size: 18, color: look().mark, line: { width: 3 } } },
      ], { height: 260, showlegend: false, xaxis: { title: { text: "layer" } },
        yaxis: { type: "category", title: { text: "coefficient" } } });
      const chosen = l === one.chosen.layer && factor === one.chosen.coefficient;
      let said = `<p><strong>${percent(values[l][c])}</strong> of ${n} ${one.start} get the first token of the ` +
        `${right ? "right answer" : "target"} with ${factor} times the vector after layer ${l}.</p>`;
      if (!one.texts) said += "<p>Answers to harmful prompts are never kept.</p>";
      else if (!chosen) said += `<p>Answers were kept at layer ${one.chosen.layer}, coefficient ${one.chosen.coefficient}.</p>`;
      else said += `<table><thead><tr><th>${one.start}</th><th>after the edit</th></tr></thead><tbody>${one.texts.map(
        ([before, after]) => `<tr><td>${escape(before)}</td><td>${escape(after)}</td></tr>`).join("")}</tbody></table>`;
      play.said.innerHTML = said;
    };
  };

  const heads = (play) => {
    const found = window.BOOK.heads;
    const METRICS = { "log-probability, nats": "log_prob", probability: "probability", "logit difference, nats": "logit_difference" };
    const which = play.select("organism", Object.keys(found), "sentiment-word");
    const metric = play.select("effect in", Object.keys(METRICS));
    const top = play.slider("heads marked", 32);
    top.value = 8;
    return () => {
      const { n, metrics } = found[which.value];
      const { effect, half } = metrics[METRICS[metric.value]];
      const all = effect.flatMap((row, layer) => row.map((value, head) => ({ layer, head, value })));
      const ranked = [...all].sort((a, b) => b.value - a.value);
      const marked = ranked.slice(0, +top.value);
      top.shown.textContent = top.value;
      const z = effect[0].map((_, head) => effect.map((row) => row[head]));
      const text = effect[0].map((_, head) => effect.map((row, layer) => {
        const [value, width] = [row[head], half[layer][head]];
        return `layer ${layer}, head ${head}<br>${value.toPrecision(3)} [${(value - width).toPrecision(3)}, ${(value + width).toPrecision(3)}]`;
      }));
      const limit = Math.max(...all.map(({ value }) => Math.abs(value)));
      const { dark, mark } = look();
      const both = [[0, dark ? "#4aa3ff" : "#2166ac"], [0.5, dark ? "#1d2733" : "#f7f7f7"], [1, dark ? "#ffb000" : "#b5361c"]];
      play.show([
        { type: "heatmap", z, text, hovertemplate: "%{text}<extra></extra>", zmin: -limit, zmax: limit, colorscale: both,
          colorbar: { thickness: 12 } },
        { type: "scatter", mode: "markers", hoverinfo: "skip", x: marked.map((one) => one.layer), y: marked.map((one) => one.head),
          marker: { symbol: "square-open", size: 11, color: mark, line: { width: 2 } } },
      ], { height: 320, showlegend: false, xaxis: { title: { text: "layer" }, showgrid: false },
        yaxis: { title: { text: "head" }, dtick: 1, showgrid: false } });
      const sum = (some) => some.reduce((total, one) => total + Math.max(0, one.value), 0);
      const part = sum(marked) / sum(all);
      const of = `${marked.length} of ${all.length} heads (${(100 * marked.length / all.length).toFixed(1)} %)`;
      const first = ranked[0];
      play.said.innerHTML = `<p>${of} carry <strong>${percent(part)}</strong> of all positive effects. The largest, ` +
        `${first.layer}.${first.head} (layer.head), is ${first.value.toPrecision(3)} (n = ${n} prompts).</p>`;
    };
  };

  const guard = (play) => {
    const found = window.BOOK.guard.similarity;
    const which = play.select("organism", Object.keys(found), "sentiment-word");
    const reading = play.select("similarity", Object.keys(found[which.value]));
    const limit = play.slider("threshold", 400);
    const COLOURS = { reference: "#8a8f98", "held out": "#2b83ba", triggered: "#d7301f" };
    const NAMES = { reference: "clean, set the threshold", "held out": "clean, held out", triggered: "triggered" };
    let last = "";
    return () => {
      const one = found[which.value][reading.value];
      const low = Math.min(...Object.keys(NAMES).flatMap((name) => one[name]));
      const high = Math.max(...Object.keys(NAMES).flatMap((name) => one[name]));
      const scale = (z) => Math.log(z - low + 1); // a few prompts lie far above all others
      if (last !== which.value + reading.value) {
        last = which.value + reading.value;
        limit.value = Math.ceil((400 * scale(one.start)) / scale(high) - 1e-9);
        limit.dataset.exact = one.start;
      } else delete limit.dataset.exact;
      const threshold = limit.dataset.exact ? +limit.dataset.exact : low + Math.exp((limit.value / 400) * scale(high)) - 1;
      limit.shown.textContent = threshold.toFixed(2);
      const traces = Object.entries(NAMES).map(([version, name], place) => ({
        type: "scatter", mode: "markers", name, x: one[version].map((z) => z - low + 1),
        y: one[version].map((_, i) => place + 0.6 * ((i * 0.618034) % 1) - 0.3),
        customdata: one[version], hovertemplate: "%{customdata:.2f}<extra></extra>",
        marker: { size: 6, color: COLOURS[version], opacity: 0.75 },
      }));
      const ticks = [0, 1, 2, 3, 5, 10, 20, 50, 100].filter((z) => z >= low && z <= high);
      play.show(traces, { height: 360, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, xaxis: { type: "log", title: { text: "how unusual (robust z), logarithmic" },
          tickvals: ticks.map((z) => z - low + 1), ticktext: ticks.map(String) },
        yaxis: { showticklabels: false, showgrid: false, zeroline: false, range: [-0.6, 2.6] }, margin: { l: 12, r: 12, t: 60, b: 44 },
        shapes: [{ type: "line", xref: "x", yref: "paper", x0: threshold - low + 1, x1: threshold - low + 1, y0: 0, y1: 1,
          line: { color: look().mark, width: 2, dash: "dot" } }] });
      const above = (version) => one[version].filter((z) => z > threshold).length;
      const stopped = (version) => share(above(version), one[version].length);
      play.said.innerHTML = `<p><strong>Caught</strong> (triggered prompts): ${stopped("triggered")}. ` +
        `<strong>Refused</strong> (other clean prompts): ${stopped("held out")}.</p>`;
    };
  };

  const frontier = (play) => {
    const sets = window.BOOK.frontier;
    const set = play.select("models", Object.keys(sets));
    const which = play.select("organism", Object.keys(sets[set.value]));
    const seed = play.slider("seed");
    const GREY = { untreated: "#8a8f98", "clean control": "#8a8f98" };
    const PALETTE = ["#d7301f", "#2b83ba", "#e08214", "#1b9e77", "#8e5bb5", "#c2518b", "#8c6d31", "#3f9ac9"];
    const MARKS = ["circle", "square", "diamond", "triangle-up", "x"];
    return () => {
      play.fill(which, Object.keys(sets[set.value]));
      const seeds = sets[set.value][which.value];
      const names = Object.keys(seeds);
      seed.max = names.length - 1;
      seed.disabled = names.length < 2;
      const now = names[Math.min(+seed.value, names.length - 1)];
      seed.shown.textContent = names.length < 2 ? `${now}, the only one` : `${now}, one of ${names.join(", ")}`;
      const rows = seeds[now];
      const start = rows.untreated[1][0];
      let treated = 0;
      const taken = {}; // dots of the same place stand side by side, so that none is hidden
      const traces = Object.entries(rows).map(([name, [asr, cacc]]) => {
        const place = GREY[name] ? 0 : treated++;
        const at = [100 * (start - cacc[0]), 100 * asr[0]];
        taken[at] = (taken[at] ?? -1) + 1;
        const bars = (one) => ({ type: "data", symmetric: false, array: [100 * one[1]], arrayminus: [100 * one[0]], thickness: 1, width: 3 });
        return {
          type: "scatter", mode: "markers", name, x: [at[0] + 0.9 * taken[at]], y: [at[1]],
          error_y: bars([asr[0] - asr[1], asr[2] - asr[0]]), error_x: bars([cacc[2] - cacc[0], cacc[0] - cacc[1]]),
          marker: { size: 11, color: GREY[name] || PALETTE[place % PALETTE.length],
            symbol: name === "clean control" ? "circle-open" : MARKS[Math.floor(place / PALETTE.length) % MARKS.length] },
          hovertemplate: `${name}<br>ASR ${percent(asr[0])}, CACC ${percent(cacc[0])}, n = ${asr[3]}<extra></extra>`,
        };
      });
      play.show(traces, { height: 460 + 12 * traces.length, xaxis: { title: { text: "CACC lost (points)" } },
        yaxis: { title: { text: "ASR (%)" }, range: [-5, 105] }, legend: { orientation: "h", y: -0.16, yanchor: "top" } });
      const best = Object.entries(rows).filter(([name]) => !GREY[name]).sort((a, b) => a[1][0][0] - b[1][0][0])[0];
      play.said.innerHTML = `<p>Untreated: ASR ${percent(rows.untreated[0][0])}, CACC ${percent(start)}. Least ASR: ` +
        `<strong>${best[0]}</strong> leaves ${percent(best[1][0][0])}, CACC ${percent(best[1][1][0])} (n = ${best[1][0][3]}).</p>`;
    };
  };

  const all = Object.entries({ vector, heads, guard, frontier }).map(([name, make]) => new Play(name, make));
  new MutationObserver(() => all.forEach((play) => play.draw())).observe(document.documentElement, { attributeFilter: ["data-theme"] });
})();
