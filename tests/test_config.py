import pytest
import torch

from mst_fx.config import Config, NothingChunkedError, OptionError
from tests.harness import reasons
from tests.models import LanguageModel, SwiGLU, token_inputs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mst.chunk_token": 8}, ["mst.chunk_token", "Did you mean 'mst.chunk_tokens'", "mst.strict"]),
        ({"chunk_tokens": 8}, ["'chunk_tokens'", "Did you mean 'mst.chunk_tokens'"]),
        ({"max_autotun": True}, ["'max_autotun'", "neither of mst nor of Inductor", "'max_autotune'"]),
        ({"mst.chunk_tokens": 0}, ["mst.chunk_tokens=0", "at least 1"]),
        ({"mst.chunk_tokens": -3}, ["mst.chunk_tokens=-3"]),
        ({"mst.chunk_tokens": True}, ["mst.chunk_tokens=True"]),
        ({"mst.chunk_tokens": 2.0}, ["mst.chunk_tokens=2.0"]),
        ({"mst.chunk_tokens": "large"}, ["'auto'"]),
        ({"mst.disable": ["chunk_attention"]}, ["mst.disable", "chunk_mlp"]),
        ({"mst.disable": 3}, ["mst.disable"]),
        ({"mst.logits": "none"}, ["mst.logits", "'lazy'", "'keep'", "'drop'"]),
        ({"mst.loss_gradient": None}, ["mst.loss_gradient", "'recompute'"]),
        ({"mst.accumulate": "bf16"}, ["mst.accumulate", "'float32'"]),
        ({"mst.compiler": "eager"}, ["mst.compiler", "'aot_eager'"]),
        ({"mst.strict": 1}, ["mst.strict", "True or False"]),
    ],
)
def test_bad_option_is_a_value_error_at_the_first_call(options: dict, words: list[str]) -> None:
    model = torch.compile(LanguageModel(SwiGLU()), backend="mst", options=options)
    with pytest.raises(ValueError, match="mst") as caught:
        model(**token_inputs())
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_other_keys_and_mode_go_to_inductor() -> None:
    config = Config.parse({"mst.strict": True, "max_autotune": True}, {"coordinate_descent_tuning": True})
    assert config.strict
    assert config.inductor == (("coordinate_descent_tuning", True), ("max_autotune", True))


def test_explain_refuses_what_compiling_would() -> None:
    import mst_fx

    for name in ("chunk_tokens", "max_autotun"):
        with pytest.raises(OptionError, match=f"unknown option '{name}'"):
            mst_fx.explain(SwiGLU(), {name: 1})


def test_disable_by_name() -> None:
    assert Config.parse({"mst.disable": "chunk_mlp"}).disable == ("chunk_mlp",)
    import mst_fx

    options = {"mst.disable": ["chunk_mlp"], "mst.chunk_tokens": 8}
    report = mst_fx.explain(LanguageModel(SwiGLU()), options)(**token_inputs())
    assert {r.kind for r in report.regions} == {"loss"}


def test_strict_raises_with_the_reasons() -> None:
    model = torch.compile(
        LanguageModel(SwiGLU()), backend="mst", options={"mst.strict": True, "mst.compiler": "aot_eager"}
    )
    with pytest.raises(NothingChunkedError, match="too small"):
        model(**token_inputs())


def test_strict_is_silent_without_a_loss() -> None:
    fn = torch.compile(lambda x: x * 2, backend="mst", options={"mst.strict": True, "mst.compiler": "aot_eager"})
    assert fn(torch.ones(3)).sum() == 6


def test_unsupported_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import mst_fx.backend

    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(OptionError, match=r"2\.11.*2\.10\.1"):
        mst_fx.backend.check_torch()


def test_nothing_to_chunk_says_why() -> None:
    import mst_fx

    report = mst_fx.explain(LanguageModel(SwiGLU()))(**token_inputs())
    assert not report.chunked
    assert "too small" in reasons(report)
