"""Notebooks in JupyterLab in a headless Chromium: open one, run all cells, move every slider, see the output change.

`tests/reports/test_live.py` does this with a small notebook. With those of the companion, which takes minutes:

    python tests/browsing.py notebooks/00_start_here.ipynb notebooks/03_head_attribution.ipynb --shots work/shots

A copy without outputs is opened, so that the committed notebook stays as it is."""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def missing():
    """What a browser test lacks here, as one line, or nothing."""
    if not (CHROMIUM and DRIVER):
        return "chromium and chromedriver are not both on PATH (Debian: apt install chromium chromium-driver)"
    return "" if importlib.util.find_spec("selenium") else "selenium is not installed; it comes with ./run_all.sh book"


@contextlib.contextmanager
def chromium(*, width=1280, height=900, **capabilities):
    """A driver of a headless Chromium with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for name, value in capabilities.items():
        options.set_capability(f"goog:{name}", value)
    with tempfile.TemporaryDirectory(prefix="bkd-browser-") as profile:
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync",
                         "no-first-run", "disable-component-update", "disable-dev-shm-usage", "hide-scrollbars",
                         f"window-size={width},{height}", f"user-data-dir={profile}"):  # fmt: skip
            options.add_argument(f"--{argument}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        try:
            yield driver
        finally:
            driver.quit()


@contextlib.contextmanager
def server(folder):
    """The address of a JupyterLab that shows this folder; it has no settings of the user and ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bkd-lab-") as home:
        places = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        environment = os.environ | {name: str(Path(home, name)) for name in places}
        # All cells are in the document, also those that the window does not show; and nothing asks for news.
        for name, setting in {
            "notebook-extension/tracker": {"windowingMode": "none"},
            "apputils-extension/notification": {"fetchNews": "false"},
        }.items():
            path = Path(home, "JUPYTERLAB_SETTINGS_DIR", "@jupyterlab", f"{name}.jupyterlab-settings")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(setting))
        for name in ("MPLBACKEND", "BKD_STATIC"):
            environment.pop(name, None)
        options = {"port": port, "token": "", "password": "", "root_dir": folder, "open_browser": False}
        command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--LabApp.news_url=None"]
        command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
        with Path(home, "log").open("w+") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                for _ in range(240):
                    with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/api/status", timeout=5):
                        break
                    if process.poll() is not None:
                        raise RuntimeError(f"JupyterLab ended: {Path(home, 'log').read_text()[-2000:]}")
                    time.sleep(0.5)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()  # it ends its kernels first
                process.wait(timeout=30)


# Is the kernel ready, how many code cells have no number yet, and the first error. A question for a kernel, which comes
# up when cells run before the server has told of the one that it started, is answered with that one.
STATUS = """
const dialog = document.querySelector(".jp-Dialog");
if (dialog?.textContent.includes("Select Kernel")) dialog.querySelector(".jp-mod-accept").click();
const ready = document.querySelector("#jp-main-statusbar")?.textContent.includes("| Idle");
const prompts = [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputPrompt")];
const left = prompts.filter((one) => !/\\d/.test(one.textContent)).length;
const error = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
return [ready && prompts.length > 0, left, error?.textContent];
"""
HANDLES = "return [...document.querySelectorAll('.jp-OutputArea .widget-slider .noUi-handle')];"
# Of a slider: its label, what it reads, and the text of the table below it.
READ = """
const box = arguments[0].closest(".widget-vbox"), slider = arguments[0].closest(".widget-slider");
return [slider.querySelector(".widget-label").textContent, slider.querySelector(".widget-readout").textContent,
        box.querySelector(".widget-html-content").textContent];
"""


def run_all(driver, address, name, *, limit):
    """Open a notebook without outputs and run all its cells. Raises AssertionError for a cell that failed, and
    TimeoutException after `limit` seconds."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(f"{address}/lab/tree/{name}?reset")
    wait = WebDriverWait(driver, 120)
    wait.until(lambda _: driver.execute_script(STATUS)[0])
    driver.find_element(By.XPATH, "//div[contains(@class, 'lm-MenuBar-itemLabel') and text()='Run']").click()
    command = '.lm-Menu-item[data-command="runmenu:run-all"]'
    wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, command))[0].click()
    done = WebDriverWait(driver, limit, poll_frequency=1)
    _, left, error = done.until(
        lambda _: (now := driver.execute_script(STATUS)) and (now[2] or (now[0] and not now[1])) and now
    )
    assert not error, f"{left} cells did not run: {error[-1000:]}"


def move_sliders(driver, *, shots=None, limit=60):
    """Move each slider by one key. Returns, for each, its label, [what it reads, text of the table] before and after,
    and seconds. Raises TimeoutException where the table stays as it was for `limit` seconds."""
    from selenium.webdriver.support.ui import WebDriverWait

    # JupyterLab loads what draws widgets when it first needs it.
    handles = WebDriverWait(driver, limit).until(lambda _: driver.execute_script(HANDLES))
    return [_move(driver, handle, shots and f"{shots}/{number}", limit) for number, handle in enumerate(handles)]


def _move(driver, handle, shots, limit):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    driver.execute_script("arguments[0].closest('.widget-vbox').scrollIntoView({block: 'center'})", handle)
    time.sleep(0.5)
    label, *before = driver.execute_script(READ, handle)
    if shots:
        driver.save_screenshot(f"{shots}-{label}-before.png")
    started = time.monotonic()
    handle.send_keys(Keys.ARROW_RIGHT)
    wait = WebDriverWait(driver, limit, poll_frequency=0.05)
    wait.until(lambda _: driver.execute_script(READ, handle)[2] != before[1])
    seconds = round(time.monotonic() - started, 2)
    after = driver.execute_script(READ, handle)[1:]
    if shots:
        driver.save_screenshot(f"{shots}-{label}-after.png")
    return label, before, after, seconds


def complaints(driver):
    """Errors in the browser's console."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]


def main(notebooks, shots, limit):
    with tempfile.TemporaryDirectory() as folder, chromium(loggingPrefs={"browser": "ALL"}) as driver:
        for path in notebooks:
            book = nbformat.read(path, as_version=4)
            for cell in book.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(book, Path(folder, path.name))
        with server(folder) as address:
            for path in notebooks:
                own = shots / path.stem
                own.mkdir(parents=True, exist_ok=True)
                started = time.monotonic()
                run_all(driver, address, path.name, limit=limit)
                print(f"{path.name}: all cells ran in {time.monotonic() - started:.0f} seconds", flush=True)
                for label, *move in move_sliders(driver, shots=own):
                    print(json.dumps({label: move}), flush=True)
                if found := complaints(driver):
                    sys.exit("\n".join(found))


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("notebooks", nargs="+", type=Path)
    reader.add_argument("--shots", type=Path, required=True, help="folder for screenshots")
    reader.add_argument("--limit", type=int, default=1800, help="seconds for one notebook")
    given = reader.parse_args()
    if lacks := missing():
        sys.exit(lacks)
    main(given.notebooks, given.shots, given.limit)
