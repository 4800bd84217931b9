"""The page of `serve --ui` in a real browser: what is typed is scored, shown in colour, and never becomes HTML."""

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from helpers import Served, picture
from websocket import create_connection

from trl_mprm.serving.server import create_app


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FILL = """(async () => {
  const bytes = Uint8Array.from(atob("PICTURE"), c => c.charCodeAt(0));
  addPictures([new File([bytes], "a.png", {type: "image/png"})]);
  while (!document.querySelector("#drop img")) await new Promise(done => setTimeout(done, 50));
  document.getElementById("question").value = "How many?";
  document.getElementById("more").click();
  document.getElementById("solution1").value = "one is red\\n\\n<img src=x onerror=\\"window.hurt = 1\\">";
  document.getElementById("solution2").value = "two are red";
  document.getElementById("score").click();
  while (document.getElementById("score").disabled) await new Promise(done => setTimeout(done, 50));
  return {
    ranking: document.getElementById("ranking").innerText, error: document.getElementById("error").innerText,
    width: document.documentElement.scrollWidth, hurt: window.hurt || 0,
    colours: [...document.querySelectorAll("#ranking b")].map(mark => mark.style.background),
  };
})()"""


class Browser:
    """A page in headless Chromium, driven by its DevTools protocol."""

    def __init__(self, folder):
        argv = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
        argv += ["--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (file.is_file() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{file.read_text().split()[0]}/json"))
        page = next(entry for entry in pages if entry["type"] == "page")
        self.socket, self.number = create_connection(page["webSocketDebuggerUrl"], timeout=60), 0

    def call(self, method, **parameters):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        return answer["result"]

    def run(self, script):
        return self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)["result"].get(
            "value"
        )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_question_is_ranked(prm, tmp_path):
    data = io.BytesIO()
    picture("red").save(data, "PNG")
    browser = Browser(tmp_path)
    try:
        with Served(create_app(prm, ui=True)) as server:
            for width in (1280, 390):
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
                browser.call("Emulation.setDeviceMetricsOverride", **size)
                browser.call("Page.navigate", url=server.url)
                while browser.run("document.readyState + typeof addPictures") != "completefunction":
                    time.sleep(0.1)
                shown = browser.run(FILL.replace("PICTURE", base64.b64encode(data.getvalue()).decode()))
                assert shown["error"] == "" and shown["hurt"] == 0 and shown["width"] <= width
                html = '<img src=x onerror="window.hurt = 1">'
                expected = prm.best_of_n([picture("red")], "How many?", [["one is red", html], ["two are red"]])
                for candidate in expected:
                    assert f"Solution {candidate.index + 1}" in shown["ranking"]
                    assert all(f"{score:.3f}" in shown["ranking"] for score in candidate.step_scores)
                assert html in shown["ranking"]
                assert len(shown["colours"]) == 3 and all("color-mix" in colour for colour in shown["colours"])
            browser.run('document.getElementById("question").value = ""; document.getElementById("score").click()')
            assert browser.run('document.getElementById("error").innerText') == "Write a question first."
    finally:
        browser.process.kill()
        browser.process.wait()
