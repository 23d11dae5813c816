"""The command line, in this process, on tiny models."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import mst_fx
from mst_fx import cli, pipeline
from mst_fx.commands import show
from mst_fx.verify import VerifyError
from tests.models import Between, LanguageModel, SwiGLU, token_inputs
from tests.test_check import plant

LLAMA = [
    "--hf", "llama", "--seq-len", "64", "--set", "hidden_size=32", "--set", "intermediate_size=96", "--set",
    "num_hidden_layers=2", "--set", "num_attention_heads=4", "--set", "num_key_value_heads=2", "--set",
    "vocab_size=128", "--option", "chunk_tokens=16",
]  # fmt: skip
ENTRY = ["--entry", "tests.test_cli:healthy", "--option", "mst.chunk_tokens=8"]


def healthy():
    return LanguageModel(SwiGLU(), Between(nn.GELU(), 80)), token_inputs()


def positional():
    return SwiGLU(), (torch.randn(2, 23, 16),)


def leaving() -> None:
    raise SystemExit(3)


def raising():
    raise RuntimeError("no such data set")


def alone():
    return SwiGLU()


def no_model():
    return 3, {}


def wrong_inputs():
    return SwiGLU(), [torch.ones(2)]


def wrong_shape():
    return SwiGLU(), (torch.randn(2, 23, 5),)


class Mixing(SwiGLU):
    """Breaks the promise that is made for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.flip(1))


def promising():
    return mst_fx.tokenwise(Mixing()), (torch.randn(2, 23, 16),)


def dropping():
    return LanguageModel(Between(nn.Dropout(0.5))), token_inputs()


def test_explain(capsys) -> None:
    assert cli.main(["explain", *LLAMA]) == 0
    assert "mst: 3 of 3 regions chunked" in capsys.readouterr().out
    assert cli.main(["explain", *LLAMA, "--checkpointing", "--dtype", "bfloat16", "--format", "json"]) == 0
    assert [r["graph"] for r in json.loads(capsys.readouterr().out)["regions"]] == ["wrap_body_0", "wrap_body_1", ""]


def test_explain_accounts_for_what_is_kept(capsys) -> None:
    assert cli.main(["explain", *LLAMA, "--saved"]) == 0
    *_, table = capsys.readouterr().out.partition("kept for the backward: ")
    assert re.match(r"\S+ KiB -> \S+ KiB, per token \(\d+ tokens\) \S+ KiB -> \S+ KiB\n", table)
    assert re.search(r" mst_fx\.sum +lm_head$", table, re.MULTILINE)
    assert re.search(r" _scaled_dot_product\S+ x2 +model\.layers\.\{0-1\}\.self_attn \(transformers/", table)
    assert cli.main(["explain", *LLAMA, "--saved", "--format", "json"]) == 0
    (memory,) = json.loads(capsys.readouterr().out)["memory"]
    for part in memory.values():
        assert sum(s["bytes"] for s in part["saved"]) == part["saved_bytes"]
    assert memory["after"]["saved_bytes"] < memory["before"]["saved_bytes"]


def test_diff_of_an_entry(capsys) -> None:
    assert cli.main(["diff", *ENTRY]) == 0
    plain = capsys.readouterr().out
    assert re.search(r"(?m)^\+ map_default: .* = mst_fx\.map\(", plain)
    assert "backward of body" not in plain
    assert "\033[" not in plain
    assert cli.main(["diff", *ENTRY, "--backward"]) == 0
    assert "backward of body" in capsys.readouterr().out
    assert cli.main(["diff", "--entry", "tests.test_cli:positional", "--option", "chunk_tokens=8"]) == 0
    assert "1 of 1 regions" in capsys.readouterr().out


def test_colour_on_a_terminal_only(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(["diff", *ENTRY])
    assert "\033[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(["diff", *ENTRY])
    assert "\033[" not in capsys.readouterr().out


def test_json_and_page(capsys, tmp_path: pathlib.Path) -> None:
    out, page = tmp_path / "d.json", tmp_path / "p.html"
    assert cli.main(["diff", *ENTRY, "--format", "json", "--out", str(out), "--html", str(page)]) == 0
    assert capsys.readouterr().out == ""
    data = json.loads(out.read_text())
    assert [h["places"] for h in data["hunks"]] == ["head", "blocks.0", "blocks.1"]
    assert data["hunks"][1]["body"]["forward"]
    assert "<!doctype html>" in page.read_text()
    assert cli.main(["diff", *ENTRY, "--format", "html"]) == 0
    assert "<!doctype html>" in capsys.readouterr().out


@pytest.mark.slow
def test_check(capsys, monkeypatch) -> None:
    assert cli.main(["diff", *ENTRY, "--check"]) == 0
    assert "as near to fp64 as plain" in capsys.readouterr().out
    plant(monkeypatch, 80)
    assert cli.main(["diff", *ENTRY, "--check"]) == 1
    assert "first region whose rewrite moves a number: mlp blocks.1" in capsys.readouterr().out
    assert cli.main(["diff", *ENTRY, "--check", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["check"]["culprit"]["path"] == "blocks.1"


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf"])
def test_a_tolerance_is_a_number_of_0_or_more(tolerance: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["diff", *ENTRY, "--check", "--tolerance", tolerance])


def test_passes_are_switched_off_by_a_list_of_names(capsys) -> None:
    assert cli.main(["explain", *ENTRY, "--option", "disable=chunk_mlp,chunk_loss"]) == 0
    assert "0 of 0 regions" in capsys.readouterr().out


def entry(name: str) -> list[str]:
    return ["--entry", f"tests.test_cli:{name}"]


BAD = {
    "no colon": (["--entry", "tests.test_cli"], "not of the form package.module:function"),
    "no module": (["--entry", "no_such_module:f"], "no_such_module can't be imported"),
    "no function": (entry("healty"), "no function 'healty'. Did you mean 'healthy'"),
    "path": (
        ["--entry", "tests/test_cli.py:healthy"],
        "a module's name is needed, as for import: tests.test_cli:healthy",
    ),
    "no callable": (entry("ENTRY"), "ENTRY is no function, but a value of type list"),
    "exits": (entry("leaving"), "leaving() raised"),
    "two options": ([*ENTRY, "--option", "chunk_tokens=8", "chunk_tokns=8"], "chunk_tokns"),
    "raises": (entry("raising"), "raising() raised"),
    "one value": (entry("alone"), "must return (model, inputs), got a value of type SwiGLU"),
    "no model": (entry("no_model"), "not callable"),
    "inputs": (entry("wrong_inputs"), "the inputs must be a dict or a tuple, got one of type list"),
    "shapes": (entry("wrong_shape"), "the model raised"),
    "seq-len": ([*ENTRY, "--seq-len", "8"], "--seq-len goes with --hf"),
    "type": (["--hf", "lama"], "unknown model type 'lama'. Did you mean 'llama'"),
    "folder": (["--hf", "/no/such"], "no such folder"),
    "set": (
        ["--hf", "llama", "--set", "hidden_size=8", "hiden_size=8"],
        "no config value 'hiden_size'. Did you mean 'hidden_size'",
    ),
    "set form": (["--hf", "llama", "--set", "hidden_size"], "not of the form NAME=VALUE"),
    "no LM": (["--hf", "vit"], "Transformers has no causal LM of this type"),
    "option": ([*ENTRY, "--option", "chunk_token=8"], "Did you mean 'mst.chunk_tokens'"),
    "option value": ([*ENTRY, "--option", "chunk_tokens=0"], "use 'auto' or an int"),
    "device": (["--hf", "llama", "--device", "nowhere"], "--device nowhere can't be used"),
    "fake device": (["--hf", "llama", "--device", "nowhere", "--fake"], "with --fake leave it out"),
    "meta device": (["--hf", "llama", "--device", "meta"], "--fake is what traces without memory"),
    "positions": (["--hf", "gpt2", "--fake", "--seq-len", "2048"], "gpt2 has 1024 positions (`transformer.wpe`)"),
    "tokens": (["--hf", "llama", "--fake", "--seq-len", "9" * 23], "tokens of 32000 can't be made"),
    "vocabulary": (["--hf", "gpt2", "--fake", "--set", "vocab_size=0"], "tokens of 0 can't be made"),
    "promise": ([*entry("promising"), "--option", "verify_tokenwise=true"], "is not token-wise"),
    "out": ([*ENTRY, "--out", "/no/such/folder/x"], "can't be written: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys) -> None:
    args, message = BAD[case]
    for command in ("explain", "diff"):
        assert cli.main([command, *args]) == (1 if case == "promise" else 2)
        error = capsys.readouterr().err
        assert error.startswith(f"mst-fx {command}: ")
        assert message in error


def test_a_traceback_shows_only_the_users_frames(capsys) -> None:
    cli.main(["diff", *entry("raising")])
    error = capsys.readouterr().err
    assert "RuntimeError: no such data set" in error
    assert "in raising" in error
    assert error.count("  File ") == 1


def test_unwritable_page_is_found_before_the_work(capsys, monkeypatch) -> None:
    monkeypatch.setattr(show, "build_model", lambda spec: pytest.fail("worked first"))
    assert cli.main(["diff", *ENTRY, "--html", "/no/such/folder/p.html"]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_nothing_chunked_under_strict_and_a_bug_of_ours_are_no_mistakes_of_the_users(capsys, monkeypatch) -> None:
    assert cli.main(["explain", *ENTRY[:2], "--option", "chunk_tokens=10000", "--option", "strict=true"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mst-fx explain: mst.strict: nothing was chunked")
    assert "TORCHDYNAMO_VERBOSE" not in error

    def broken(*_):
        raise VerifyError("node linear is gone")

    passes = tuple((name, broken if name == "chunk_mlp" else run) for name, run in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", passes)
    assert cli.main(["explain", *ENTRY]) == 1
    assert "a bug of mst_fx; please report it: node linear is gone" in capsys.readouterr().err


def test_the_package_and_the_commands_help_do_not_wait_for_torch() -> None:
    script = """
import sys, mst_fx.cli
try:
    mst_fx.cli.main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "finetune" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_check_that_cannot_be(capsys) -> None:
    assert cli.main(["diff", *LLAMA, "--fake", "--check"]) == 2
    assert "fake tensors hold no numbers" in capsys.readouterr().err
    assert cli.main(["diff", *entry("dropping"), "--check"]) == 2
    assert "draws random numbers" in capsys.readouterr().err
    assert cli.main(["diff", *ENTRY, "--tolerance", "1"]) == 2
    assert "go with --check" in capsys.readouterr().err


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "run_explain", interrupt)
    assert cli.main(["explain", "--hf", "llama"]) == 130
    assert capsys.readouterr().err.strip() == "mst-fx explain: interrupted"
