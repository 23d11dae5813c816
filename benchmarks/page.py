"""Takes the picture of the page for the README: ``python -m benchmarks.page``. Needs playwright and a Chromium."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

import mst_fx
from mst_fx.commands.models import ModelSpec, build_model

SIZES = {
    "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8192, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
PICTURE = pathlib.Path(__file__).parent / "results" / "page.png"


def main() -> None:
    """Write the page of a small Llama, open one rewritten region in it, and take its picture."""
    from playwright.sync_api import sync_playwright

    subject = build_model(ModelSpec(hf="llama", settings=SIZES, seq_len=2048, fake=True))
    report = mst_fx.explain(subject.model, {"mst.chunk_tokens": 256})(**subject.kwargs)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        path = pathlib.Path(folder) / "page.html"
        report.to_html(path)
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1400, "height": 900})
        view.goto(path.as_uri())
        view.locator(".row.changed", has_text="linear(").first.click()
        view.screenshot(path=str(PICTURE), full_page=True)
        chromium.close()


if __name__ == "__main__":
    main()
