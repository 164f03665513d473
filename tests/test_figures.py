"""README's tables say what the committed results say."""

import json
from pathlib import Path

import figure_attention
import figure_hadamard
import figure_plots
import figure_tables
import figures
import make_figures
import pytest
import typer
from figures import BLOCKS, FiguresError, read_results, source, table
from make_figures import fill
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]


def run(*arguments: str):
    app = typer.Typer()
    app.command()(make_figures.main)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with one block, whose results say 1."""
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- figures:speed -->\nold\n<!-- /figures:speed -->\nafter\n")
    (tmp_path / "speed.json").write_text('{"tokens": 1}')
    monkeypatch.setattr(make_figures, "DOCUMENTS", (file,))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figure_plots, "FOLDER", tmp_path)
    for name in list(BLOCKS):
        monkeypatch.delitem(BLOCKS, name)
    for name in list(figure_plots.PLOTS):
        monkeypatch.delitem(figure_plots.PLOTS, name)
    monkeypatch.setitem(BLOCKS, "speed", lambda: f"{read_results('speed')['tokens']} tok/s")
    monkeypatch.setitem(
        figure_plots.PLOTS, "bars", ("speed", lambda axes, result: axes.bar([0], [result["tokens"]]))
    )
    return file


def test_documents_are_up_to_date() -> None:
    result = run("--check")
    assert result.exit_code == 0, result.output


def test_results_say_how_they_were_measured_and_name_no_path() -> None:
    files = sorted((ROOT / "scripts" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        assert {"command", "date", "device", "versions"} <= json.loads(text).keys(), file.name
        assert not any(root in text for root in ("/root", "/home", "/tmp", "/work", "/Users")), file.name


def test_fills_its_blocks_and_nothing_else(readme: Path) -> None:
    assert run().exit_code == 0
    assert readme.read_text() == "before\n<!-- figures:speed -->\n1 tok/s\n<!-- /figures:speed -->\nafter\n"
    assert "<svg" in (readme.parent / "bars.svg").read_text()
    assert run("--check").exit_code == 0


def test_check_fails_when_results_have_changed_and_writes_nothing(readme: Path) -> None:
    assert run().exit_code == 0
    filled = readme.read_text()
    (readme.parent / "speed.json").write_text('{"tokens": 2}')
    result = run("--check")
    assert result.exit_code == 1
    assert "README.md, docs/bars.svg stale; run: make figures" in result.output
    assert readme.read_text() == filled


def test_missing_results_are_named(readme: Path) -> None:
    (readme.parent / "speed.json").unlink()
    result = run()
    assert result.exit_code == 1
    assert "results/speed.json is missing" in result.output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "have blocks"),
        (
            "<!-- figures:speed -->\n<!-- /figures:speed -->\n<!-- figures:size -->\n<!-- /figures:size -->",
            "size",
        ),
        ("<!-- figures:speed -->\n", "figures:speed is not closed"),
    ],
)
def test_blocks_and_functions_belong_together(readme: Path, text: str, says: str) -> None:
    with pytest.raises(FiguresError, match=says):
        fill({"README.md": text})


def test_table() -> None:
    assert table(["a", "b"], [["x", 1], ["y", 2]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"


def test_source_of_figures() -> None:
    result = {"device": "CPU", "versions": {"torch": "2.13"}, "date": "2026-01-02", "command": "python x.py"}
    assert source(result) == "CPU; torch 2.13; 2026-01-02: `python x.py`"


ABOUT = {"device": "GPU", "versions": {}, "date": "2026-01-02", "command": "python x.py"}


def given(monkeypatch: pytest.MonkeyPatch, **results: dict) -> None:
    """Results that tables are made of instead of those of the repository."""
    for module in (figure_attention, figure_hadamard, figure_tables):
        monkeypatch.setattr(module, "read_results", results.__getitem__)


def transform(n: int, dtype: str, exponent: int, **us: float) -> dict:
    return {"n": n, "dtype": dtype, "elements": (1 << exponent) // n * n, "us": us, "hot_us": us}


def test_hadamard_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From results as the benchmark writes them; what was not measured is left empty."""
    rows = [
        transform(128, "bf16", 20, copy=2, ours=4),
        transform(128, "bf16", 25, copy=48, ours=50, dense=96),
        transform(128, "fp32", 25, copy=96, ours=960),
        transform(14336, "bf16", 25, copy=48, ours=60),
    ]
    peers: dict = {"device": "another GPU", "date": "2025-01-02"}
    peers |= {"share_of_copy_at_2_27_elements_bf16": {"HadaCore": {"128": 1.0}, "FlagGems": {"256": 0.99}}}
    peers |= {"share_of_copy_at_2_25_elements_bf16": {"butterfly": {"14336": 0.4}}}
    worst = {"torch.float16": {"error_in_floors": 1}}
    given(
        monkeypatch,
        hadamard=ABOUT | {"rows": rows},
        hadamard_peers=peers,
        check_hadamard={"random_cases": {"cases": 7, "worst": worst}},
    )
    text = figure_hadamard.hadamard_speed()
    assert "| n, bf16 | 2^20 | 2^25 | hot | dense | HadaCore | FlagGems |" in text
    assert "| 128 | 0.50 | 0.96 | 2.00 | 0.50 | 1.00 |  |" in text
    assert "| 14336 | 0.80 |  |  | 0.40 |" in text
    assert "0.10 for 128" in text and "7 random cases: float16 1.000 floors" in text
    assert "another GPU of 2025-01-02" in text


def test_hadamard_over_butterfly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        transform(128, "bf16", 20, ours=4, fast_hadamard_transform=8),
        transform(128, "fp16", 20, ours=4, fast_hadamard_transform=88),
        transform(128, "fp32", 25, ours=4000, fast_hadamard_transform=100),
        transform(128, "bf16", 25, ours=50, fast_hadamard_transform=150),
        transform(256, "bf16", 25, ours=50, fast_hadamard_transform=45),
        transform(14336, "bf16", 25, ours=60),
    ]
    given(monkeypatch, hadamard=ABOUT | {"rows": rows})
    text = figure_hadamard.hadamard_over_butterfly()
    assert "| 128 | 2.00x | 3.00x | 2.00x |" in text and "| 256 |  | 0.90x |  |" in text
    assert "0.90x to 3.00x, in the median 2.00x." in text and "0.025x for 128." in text
    assert "14336" not in text and "22" not in text
    given(monkeypatch, hadamard=ABOUT | {"rows": rows[-1:]})
    with pytest.raises(FiguresError, match="no times of fast_hadamard_transform"):
        figure_hadamard.hadamard_over_butterfly()


def test_rotate_quantize_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    work = {"work": "q and k", "tokens": 8192, "us": 50.04, "floor_us": 45.0, "share_of_floor": 0.899}
    part = {"cases": 5, "failed": 0}
    given(
        monkeypatch,
        rotate_quantize=ABOUT | {"times": [work, work | {"work": "one token", "tokens": 1}]},
        check_rotate_quantize={"random_cases": part, "random_rows": part | {"failed": 2}},
    )
    text = figure_hadamard.rotate_quantize_speed()
    assert "| q and k | 50.0 µs | 45.0 µs | 90% |" in text
    assert "one token: 50.0 µs. 10 random problems, value by value against float64: 2 beyond" in text


def test_experts_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    us = {"int4": 180.5, "bf16 grouped_mm": 361.0, "int4, eager": 700.0}
    row = {"tokens": 64, "us": us, "times_faster_than_bf16": 2.0}
    row |= {"products_tflop_per_s": 28.6, "times_faster_than_loop": 36.79}
    products = {"cases": 7, "worst_error_in_floors": 1.0, "models_error_in_floors": {"a": 1.0, "b": 1.25}}
    given(monkeypatch, experts={"prefill": ABOUT | {"times": [row], "products": products}})
    text = figure_tables.experts_prefill()
    assert "| 64 | 180 µs | 361 µs | 2.00x | 29 | 700 µs | 36.8x |" in text
    assert "7 random problems, largest error 1.25 floors." in text


def prefill(tokens: int, causal: bool = True, d: int = 128, **tflops: int) -> dict:
    tflops = {name.replace("_", " "): value for name, value in tflops.items()}
    return {"d": d, "tokens": tokens, "causal": causal, "tflops": tflops, "us": tflops}


def test_attention_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that were not there are left out; what failed, ours or theirs, is not."""
    decode = {"batch": 8, "keys": 4096, "us": {"fp8 all": 19.61}, "share_of_copy": {"fp8 all": 0.142}}
    other = {"batch": 8, "keys": 9, "us": {"sdpa flash bf16": 31.4}, "share_of_copy": {"sdpa flash bf16": 1}}
    rows = [
        prefill(1024, sdpa_flash=300, sdpa_cudnn=500, fp8_all=600),
        prefill(4096, sdpa_cudnn=510),
        prefill(4096, causal=False, sdpa_cudnn=520, fp8_all=610),
        prefill(1024, d=64, sdpa_cudnn=250, fp8_all=350),
    ]
    given(
        monkeypatch,
        attention=ABOUT | {"prefill": rows, "decode": [decode, other], "copy_bandwidth_tb_per_s": 3},
    )
    text = figure_attention.attention_prefill()
    assert "| TFLOP/s, heads of 128 | causal, 1024 | causal, 4096 | full, 4096 |" in text
    assert "| SDPA, flash, bf16 | 300 | failed | failed |" in text
    assert "| ours, fp8 | 600 | failed | 610 |" in text
    assert "| ours, fp8 | 350 |" in text and "FlashAttention" not in text
    text = figure_attention.attention_decode()
    assert "| one token | fp8 | SDPA, flash, bf16 |" in text
    assert "| batch 8, 4096 keys | 19.6 µs, 14% | failed |" in text
    text = figure_attention.attention_summary()
    assert "| causal prefill of 1024 tokens: TFLOP/s | 500 | 600 | failed |" in text
    assert "| one token, batch 8, 4096 keys: µs | failed | 20 | failed |" in text
    assert "610" not in text and "350" not in text


def test_attention_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by(kernel: str, mode: str, error: float) -> dict:
        row = {"kernel": kernel, "mode": mode, "distribution": "normal", "error": error, "reference": 0.03}
        return row | {"tokens": 1, "keys": 8192, "value_mean": 1.0, "emulated": 0.002}

    rows = [
        off_by("attention_hopper", "fp8", 0.05267),
        off_by("attention_triton", "fp8", 0.0527),
        off_by("attention_triton", "int8-fp8", 0.0384),
    ]
    part = {"random": {"cases": 7, "failed": 0}}
    bad = {"random": {"cases": 9, "failed": 2}}
    checked = ABOUT | {"distributions": rows, "attention_hopper": bad, "attention_triton": part}
    given(monkeypatch, check_attention=checked | {"long_context": [*rows, rows[0] | {"keys": 32768}]})
    text = figure_attention.attention_errors()
    assert "| fp8, Hopper kernel | 0.0527 |" in text and "| int8-fp8, Hopper kernel | failed |" in text
    assert "| int8-fp8, reference | 0.0300 |" in text
    assert "9 with the Hopper kernel, 2 beyond what rounding allows; 7 with the portable kernel, none" in text
    text = figure_attention.attention_long_context()
    assert "| V ~ N(1, 1), 8192 | V ~ N(1, 1), 32768 |" in text
    assert "| fp8, Hopper kernel, 1 query | 5.27% (0.20%) | 5.27% (0.20%) |" in text
    assert "| int8-fp8, portable kernel, 1 query | 3.84% (0.20%) | failed |" in text
