"""The comparison with other quantizers, with a package of known results in the place of one of them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark_quality
import benchmark_quality_peers
import pytest
import torch
from benchmark_quality import Options
from benchmark_quality_peers import OURS, Recipe, measure, merge_report, recipes_of
from evaluation_cases import word_tokenizer
from quality_cases import make_tiny_benchmark
from quality_peers import PEERS
from safetensors.torch import load_file

from hf_hadacore.offline.calibration import Calibration, calibration_tokens

# Rounds to the nearest value, as benchmark_quality's min-max does, and keeps what it was shown.
FAKE_AUTO_ROUND = f"""
import sys
from pathlib import Path

sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import torch
from packed_checkpoints import AWQ, Grid, awq_tensors, write_packed
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hadacore import int4
from hf_hadacore.solvers.rtn import quantize_weight


class AutoRound:
    def __init__(self, source, **options):
        if options["iters"]:
            raise RuntimeError("only 0 iterations")
        self.source, self.options = source, options

    def quantize_and_save(self, target, format):
        assert format == "auto_awq"
        folder = Path(target) / "a-name-of-its-own"
        tokens = torch.cat([batch["input_ids"] for batch in self.options["dataset"]])
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype="auto")
        size, grids = self.options["group_size"], {{}}
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and name != "lm_head":
                weight = quantize_weight(module.weight.detach(), group_size=size, symmetric=False,
                                         scale_dtype=torch.bfloat16, search=False, name=name)
                columns = torch.arange(module.in_features) // size
                q, zero = int4.unpack(weight.packed).long(), weight.zero.long()
                grids[name] = Grid(q, zero, weight.scale, columns)
        write_packed(folder, model, grids, awq_tensors, {{**AWQ, "group_size": size}})
        AutoTokenizer.from_pretrained(self.source).save_pretrained(folder)
        save_file({{"tokens": tokens}}, Path(__file__).with_name("seen.safetensors"))
"""


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    return Options(
        *(make_tiny_benchmark(tmp_path, monkeypatch), tmp_path, [benchmark_quality.Recipe("min-max", 32)]),
        **{"device": "cpu", "dtype": "float32", "windows": 3, "samples": 10, "sequence_length": 32},
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a package in the place of auto-round."""
    folder = tmp_path / "site"
    (folder / "auto_round-1.2.3.dist-info").mkdir(parents=True)
    (folder / "auto_round-1.2.3.dist-info" / "METADATA").write_text("Name: auto-round\nVersion: 1.2.3\n")
    (folder / "auto_round.py").write_text(FAKE_AUTO_ROUND)
    return folder


def test_a_peer_sees_the_tokens_of_ours_and_its_values_are_measured(options: Options, site: Path) -> None:
    recipes = [
        Recipe(OURS, "GPTQ, static act-order", 32, symmetric=False),
        *(Recipe("auto-round", method, 32, symmetric=False) for method in ("RTN", "50 iterations")),
    ]
    ours, rtn, failed = measure("tiny", recipes, options, {"auto-round": site})["recipes"]
    calibration = Calibration(options.data / benchmark_quality.CALIBRATION, 10, 32)
    expected = calibration_tokens(calibration, word_tokenizer())
    assert torch.equal(load_file(site / "seen.safetensors")["tokens"], expected)

    minmax = benchmark_quality.measure("tiny", options)["recipes"][0]
    assert rtn["version"] == "1.2.3"
    # The benchmark's own rounds the values to the model's dtype once more.
    for key in ("over_baseline", "kl"):
        name = "nll" if key == "over_baseline" else "value"
        assert rtn[key][name] == pytest.approx(minmax[key][name], rel=0.02)
    assert rtn["over_ours"]["nll"] == pytest.approx(
        rtn["over_baseline"]["nll"] - ours["over_baseline"]["nll"], abs=2e-5
    )
    assert "over_ours" not in ours and ours["bits_per_weight"] == rtn["bits_per_weight"]
    assert failed["failed"] == "PeerError: RuntimeError: only 0 iterations"
    assert "perplexity" not in failed
    assert sorted(file.name for file in options.work.iterdir()) == ["data", "site", "tiny"]


def test_recipes_are_compared_at_the_same_groups_and_symmetry() -> None:
    recipes = recipes_of(["llm-compressor"], [64], [False, True])
    assert len(recipes) == 2 * (2 + len(PEERS["llm-compressor"].methods)) == len(set(recipes))
    for recipe in recipes:
        assert recipe.ours in recipes and recipe.ours.ours == recipe.ours
        assert recipe.ours[2:] == recipe[2:]


def test_reports_of_one_measurement_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "report.json"

    def report(*recipes: str, tokens: int = 45, device: str = "cpu", model: str = "a") -> dict:
        rows = [{"recipe": recipe, "by": len(recipes)} for recipe in recipes]
        return {"date": "today", "device": device, "models": {model: {"tokens": tokens, "recipes": rows}}}

    def recipes(model: str = "a") -> list[tuple[str, int]]:
        return [
            (row["recipe"], row["by"]) for row in json.loads(file.read_text())["models"][model]["recipes"]
        ]

    merge_report(report("ours", "x"), file)
    merge_report(report("y"), file)
    assert recipes() == [("ours", 2), ("x", 2), ("y", 1)]
    merge_report(report("x"), file)
    assert recipes() == [("ours", 2), ("x", 1), ("y", 1)]
    merge_report(report("z", model="b"), file)
    assert len(recipes()) == 3 and recipes("b") == [("z", 1)]
    merge_report(report("x", tokens=15), file)  # other tokens
    assert recipes() == [("x", 1)]
    merge_report(report("x", device="cuda"), file)
    assert list(json.loads(file.read_text())["models"]) == ["a"]


def test_what_is_measured_by_default(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = SimpleNamespace(names=[])

    def record(name: str, recipes: list[Recipe], *_: object) -> dict:
        found.names = [recipe.quantizer for recipe in recipes]
        return {}

    monkeypatch.setattr(benchmark_quality_peers, "measure", record)
    for peer in PEERS.values():
        monkeypatch.delitem(sys.modules, peer.module, raising=False)
    monkeypatch.setattr(benchmark_quality_peers, "find_spec", lambda module: module == "llmcompressor")
    arguments = {"model": ["tiny"], "site": [f"gptqmodel={tmp_path}"], "device": "cpu"}
    benchmark_quality_peers.main(options.data, **arguments)
    assert set(found.names) == {OURS, "gptqmodel", "llm-compressor"}  # auto-round is not installed
    benchmark_quality_peers.main(options.data, only="AWQ, asym.*64", **arguments)
    assert sorted(set(found.names)) == [OURS, "llm-compressor"] and found.names.count("llm-compressor") == 1
