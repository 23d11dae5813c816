"""The page: what is in it without a browser, and what it does in a real one."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

import mst_fx
from mst_fx.commands.models import ModelSpec, build_model
from mst_fx.diff import page as page_module
from mst_fx.diff.graph_diff import subgraphs
from mst_fx.diff.liveness import Saved, Timeline
from mst_fx.diff.side_by_side import aligned_blocks, aligned_rows
from mst_fx.diff.steps import Moment
from mst_fx.report import BodyCode, GraphPair, RegionReport, Report
from tests.models import LARGE, LanguageModel, SwiGLU, hf, hf_inputs, token_inputs

OPTIONS = {"mst.chunk_tokens": 8}
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028{{ 7 * 7 }}&\"'"


def timeline(scale: int, count: int = 2000, text: str = "mul: float32[4] = mul(a, b)") -> Timeline:
    moments = [
        Moment("forward" if i < count // 3 else "backward", f"n{i}", text, "model.py:3", "layers.0", scale * (i % 97))
        for i in range(count)
    ]
    peak = max(moments, key=lambda m: m.live_bytes, default=None)
    saved = (Saved(f"float32[4] {text[:3]}", "model.py:3", "layers.0", scale),)
    return Timeline(tuple(moments), saved, peak.live_bytes if peak else 0, peak, scale, "logits")


class WithTimelines(Report):
    """A report whose live bytes are made by hand."""

    found: Any = None

    def timelines(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def with_timelines(report: Report, found: Any) -> Report:
    made = WithTimelines(report.regions, report.notes, report.bodies, report.graphs)
    object.__setattr__(made, "found", found)
    return made


def llama(checkpointing: bool) -> Report:
    model = hf("llama")
    if checkpointing:
        model.gradient_checkpointing_enable()
    return mst_fx.explain(model, OPTIONS)(**hf_inputs("llama"))


def synthetic(layers: int, per_layer: int = 70, name: str = "mul", source: str = "/home/someone/model.py") -> Report:
    """Layers that each lose three nodes to one, built by hand."""
    before, after = fx.Graph(), fx.Graph()
    value, rewritten = before.placeholder("x"), after.placeholder("x")
    rewritten.meta["mst_origin"] = "x"
    regions = []
    for layer in range(layers):
        nodes: list[str] = []
        for i in range(per_layer):
            trace = f'  File "{source}", line {i + 1}, in forward\n'
            meta = {"nn_module_stack": {"m": (f"L['self'].layers.{layer}.mlp", None)}, "stack_trace": trace}
            value = before.call_method("mul", (value, 2))
            value.meta = dict(meta)
            if i in (40, 41, 42):
                nodes.append(value.name)
                if i == 42:
                    rewritten = after.call_method("chunked", (rewritten, "0" * 24))
                    rewritten.meta = {"mst_region": nodes[0]}
                continue
            rewritten = after.call_method("mul", (rewritten, 2))
            rewritten.meta = {**meta, "mst_origin": value.name}
        place = f"layers.{layer}.mlp"
        regions.append(
            RegionReport("mlp", f"{source}:41", 64, 8, 8, 4096, 512, "chunked", "recomputed in the backward",
                path=place, nodes=tuple(nodes), body="0" * 24)
        )  # fmt: skip
    before.output((value,))
    after.output((rewritten,)).meta["mst_origin"] = "output"
    pair = GraphPair(fx.GraphModule({}, before), fx.GraphModule({}, after))
    for node in (*before.nodes, *after.nodes):
        if node.op == "call_method" and node.target == "mul":
            node.target = name  # only now: a name that is no code can't be compiled
    body = BodyCode("0" * 24, f"def body(x0):  # {name}\n    return x0", "def body(dy0):\n    return dy0")
    return Report(tuple(regions), (f"a note of {name}",), (body,), (pair,))


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match.group(1))


def lines_of(data: dict[str, Any]) -> list[list[Any]]:
    """Every row as [before, after, source, module, region, kept]."""
    rows = [r for g in data["graphs"] for b in g["blocks"] for i in b["items"] for r in i["rows"]]
    return [[*(data["texts"][k] if k >= 0 else "" for k in r[:4]), *r[4:]] for r in rows]


# -- rows --------------------------------------------------------------------------------------------


def test_every_node_is_in_one_row_and_kept_ones_are_beside_themselves() -> None:
    report = llama(checkpointing=False)
    pair = report.graphs[0]
    rows = [r for b in aligned_blocks(report, 0) for stretches in b.repeats for s in stretches for r in s.rows]
    assert [r.before for r in rows if r.before] == list(pair.before.graph.nodes)
    assert [r.after for r in rows if r.after] == list(pair.after.graph.nodes)
    for row in rows:
        assert row.before is not None or row.after is not None
        if row.kept:
            assert row.after is not None
            assert row.before is not None
            assert row.after.meta["mst_origin"] == row.before.name
    changed = {r.region.path for r in rows if r.region}
    assert changed == {"model.layers.0.mlp", "model.layers.1.mlp", "lm_head"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_layers_are_one_block(checkpointing: bool) -> None:
    folded = [b for b in aligned_blocks(llama(checkpointing), 0) if len(b.repeats) > 1]
    assert [(b.places, b.graphs, len(b.repeats)) for b in folded] == [
        ("model.layers.{0-1}", "wrap_body_{0-1}" if checkpointing else "", 2)
    ]


def test_a_checkpointed_block_stands_where_it_is_called() -> None:
    report = llama(checkpointing=True)
    rows = [r for b in aligned_blocks(report, 0) for stretches in b.repeats for s in stretches for r in s.rows]
    names = [r.before.name for r in rows if r.before]
    assert sorted(names) == sorted(n.name for g in subgraphs(report.graphs[0].before).values() for n in g.graph.nodes)
    assert [r.region.path for r in rows if r.region][-1] == "lm_head"


def test_layers_are_folded_when_what_is_between_them_has_no_module() -> None:
    model = LanguageModel(SwiGLU(), SwiGLU(), SwiGLU())
    blocks = aligned_blocks(mst_fx.explain(model, OPTIONS)(**token_inputs()), 0)
    assert [(b.places, len(b.repeats)) for b in blocks if len(b.repeats) > 1] == [("blocks.{0-2}", 3)]


def test_a_node_that_moved_is_shown_where_it_was_and_where_it_is() -> None:
    before, after = fx.Graph(), fx.Graph()
    for graph, names in ((before, "abcd"), (after, "bcda")):
        for name in names:
            node = graph.create_node("call_method", name, name=name)
            node.meta["mst_origin"] = name
    rows = aligned_rows(before, after)
    found = [(r.before and r.before.name, r.after and r.after.name, r.kept) for r in rows]
    kept = [(n, n, True) for n in "bcd"]
    assert found == [("a", None, False), *kept, (None, "a", False)]


# -- without a browser -------------------------------------------------------------------------------


def test_data_holds_every_node_and_body(tmp_path: pathlib.Path) -> None:
    report = mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    data = data_of(text)
    rows = lines_of(data)
    pair = report.graphs[0]
    assert sum(bool(r[0]) for r in rows) == len(pair.before.graph.nodes)
    assert sum(bool(r[1]) for r in rows) == len(pair.after.graph.nodes)
    assert [b["forward"] for b in data["bodies"]] == [b.forward for b in report.bodies]
    assert [r["title"] for r in data["regions"]] == [f"{r.kind} {r.path}".strip() for r in report.chunked]
    assert any("mst_fx.map" in r[1] and data["regions"][r[4]]["title"] == "mlp blocks.0" for r in rows)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)


def test_hostile_names_stay_text() -> None:
    report = synthetic(2, 50, name=HOSTILE, source=f"/x/{HOSTILE[:9]}.py")
    report = with_timelines(report, ((timeline(9, 40, HOSTILE),) * 2,))
    text = page_module.page_text(report)
    assert text.count("</script") == 2
    assert "<img" not in text
    assert any(HOSTILE in t for t in data_of(text)["texts"])


def test_size_with_many_layers() -> None:
    report = with_timelines(synthetic(32, 90), ((timeline(1 << 20, 9000), timeline(1 << 18, 7000)),))
    text = page_module.page_text(report)
    data = data_of(text)
    assert [len(b["items"]) for b in data["graphs"][0]["blocks"] if len(b["items"]) > 1] == [32]
    assert len(text.encode()) < 5_000_000
    assert max(len(data["timelines"][0][k]) for k in ("before", "after")) <= 600


def test_decimation_keeps_the_peak() -> None:
    found = page_module.points(timeline(3, 5000).moments, 1 / 3, most=50)
    assert len(found) <= 50
    assert max(p.moment.live_bytes for p in found) == 3 * 96
    assert [p.x for p in found] == sorted(p.x for p in found)


@pytest.mark.parametrize(
    ("found", "words"),
    [(RuntimeError("no <backward>"), "RuntimeError: no &lt;backward&gt;"), ((), None)],
)
def test_without_timelines_the_page_says_why(found: Any, words: str | None) -> None:
    text = page_module.page_text(with_timelines(synthetic(1), found))
    assert "<svg" not in text
    assert words is None or words in text


def test_without_matplotlib_the_page_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page_module.page_text(with_timelines(synthetic(1), ((timeline(5), timeline(4)),)))
    assert "<svg" not in text
    assert "mst_fx[demo]" in text


@pytest.mark.parametrize("count", [0, 1])
def test_timelines_of_almost_nothing(count: int) -> None:
    assert "<svg" in page_module.page_text(with_timelines(synthetic(1), ((timeline(1, count), timeline(1, count)),)))


def test_nothing_compiled() -> None:
    assert "0 of 0 regions chunked" in page_module.page_text(Report())


@pytest.mark.parametrize("bad", ["missing/page.html", "."])
def test_an_unwritable_path_is_known_before_any_work(
    bad: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "page_text", lambda report: pytest.fail("worked first"))
    with pytest.raises(OSError, match="the page can't be written") as caught:
        Report().to_html(tmp_path / bad)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- in a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a Chromium on the PATH")
    with playwright.sync_playwright() as p:
        # The sandbox needs rights that containers lack; the pages are our own.
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: pathlib.Path) -> Iterator[Any]:
    """Opens a report's page; at the end there must have been no error and no request for anything else."""
    errors: list[str] = []
    view = browser.new_page(viewport={"width": 1400, "height": 900})
    view.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    view.on("pageerror", lambda e: errors.append(str(e)))
    view.on("request", lambda r: errors.append(r.url) if not r.url.startswith(("file:", "data:")) else None)

    def show(report: Report) -> Any:
        report.to_html(tmp_path / "page.html")
        view.goto((tmp_path / "page.html").as_uri())
        return view

    yield show
    view.close()
    assert errors == []


def expect(view: Any, selector: str, text: str | re.Pattern[str]) -> None:
    from playwright.sync_api import expect as eventually

    eventually(view.locator(selector)).to_have_text(text)


def small(name: str) -> Report:
    torch.manual_seed(0)
    if name == "swiglu":
        return mst_fx.explain(LanguageModel(SwiGLU()), OPTIONS)(**token_inputs())
    return llama(checkpointing=name == "checkpointed")


@pytest.mark.parametrize("name", ["swiglu", "llama", "checkpointed"])
def test_page_of_a_model(opened: Any, name: str) -> None:
    view = opened(with_timelines(small(name), ((timeline(1 << 20), timeline(1 << 18)),)))
    assert view.locator(".timeline svg").bounding_box()["width"] > 1000
    assert view.locator(".timeline svg path").count() > 10

    removed = view.locator(".row.changed", has_text="silu(").first
    removed.click()
    assert view.locator(".panel .forward pre").inner_text().startswith("def body(")
    assert "dy0" in view.locator(".panel .backward pre").inner_text()
    removed.press("Enter")
    assert view.locator(".panel").count() == 0
    removed.press("Enter")
    assert view.locator(".panel").count() == 1

    view.keyboard.press("/")
    view.keyboard.type("silu")
    expect(view, "#matches", re.compile(r"^1 of \d+$"))
    assert "silu" in view.locator(".row.current").inner_text()
    assert view.locator(".row.current").is_visible()


def test_timeline_is_read_by_pointer_and_keys(opened: Any) -> None:
    view = opened(with_timelines(synthetic(2), ((timeline(1 << 20), timeline(1 << 18)),)))
    figure = view.locator(".timeline")
    figure.hover()
    tip = view.locator(".tip")
    assert tip.is_visible()
    assert "mul: float32[4] = mul(a, b)" in tip.inner_text()
    assert "model.py:3" in tip.inner_text()
    figure.focus()
    view.keyboard.press("End")
    last = tip.inner_text()
    view.keyboard.press("ArrowLeft")
    assert tip.is_visible()
    assert tip.inner_text() != last
    view.keyboard.press("Escape")
    assert tip.is_hidden()


def test_search_opens_folds_and_goes_round(opened: Any) -> None:
    view = opened(synthetic(32))
    assert view.locator(".row").count() < 100
    assert view.locator(".times").inner_text() == "\N{MULTIPLICATION SIGN}32"
    box = view.locator("#query")
    box.fill("layers.30. chunked")
    expect(view, "#matches", "1 of 2")
    assert view.locator(".row.current").is_visible()
    box.fill("LAYERS.3.mlp")
    expect(view, "#matches", "1 of 70")
    for key, expected in (("Enter", "2 of 70"), ("Shift+Enter", "1 of 70"), ("Shift+Enter", "70 of 70")):
        box.press(key)
        assert view.locator("#matches").inner_text() == expected
        assert view.locator(".row.current").count() == 1
    box.fill("no such node")
    expect(view, "#matches", "no match")


def test_arrows_move_between_nodes_and_the_table_leads_to_its_region(opened: Any) -> None:
    view = opened(synthetic(3))
    view.locator("button[data-region]").first.press("Enter")
    assert view.locator(".panel .codes").count() == 1
    first = view.evaluate("document.activeElement.innerText")
    view.keyboard.press("ArrowDown")
    assert view.evaluate("document.activeElement.innerText") != first
    view.keyboard.press("ArrowUp")
    assert view.evaluate("document.activeElement.innerText") == first


@pytest.mark.slow
def test_page_of_32_layers(opened: Any, tmp_path: pathlib.Path) -> None:
    spec = ModelSpec(hf="llama", settings={**LARGE, "num_hidden_layers": 32}, seq_len=65536, fake=True)
    subject = build_model(spec)
    view = opened(mst_fx.explain(subject.model)(**subject.kwargs))
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    # What makes a page sluggish is what it holds; folded layers are built when they are opened.
    assert view.locator("*").count() < 1500
    assert view.locator(".timeline svg").bounding_box()["width"] > 1000
    view.locator("#query").fill("layers.30. mst_fx.map(")
    expect(view, "#matches", "1 of 1")
    assert view.locator(".row.current").is_visible()
    view.locator(".row.current").click()
    assert view.locator(".panel .forward pre").inner_text().startswith("def body(")
    assert view.locator("*").count() < 3000


def test_hostile_names_run_nothing(opened: Any) -> None:
    report = synthetic(2, 50, name=HOSTILE, source="/x/<b>.py")
    view = opened(with_timelines(report, ((timeline(9, 40, HOSTILE),) * 2,)))
    view.locator(".row.changed").first.click()
    view.locator(".timeline").hover()
    assert view.locator("img").count() == 0
    assert HOSTILE[:30] in view.locator(".tip").inner_text()
