"""`generate` with CUDA graphs against plain `generate`, with tiny models on one GPU.

    python scripts/check_generate_gpu.py

Every case runs, whatever the others do; the summary comes last.
"""

import copy
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, TextIteratorStreamer

from hf_hadacore import HadaCoreConfig
from hf_hadacore.attention import decode_cache
from hf_hadacore.decoding.generation import DecodeGraphs, disable_cuda_graphs, enable_cuda_graphs
from hf_hadacore.decoding.graph import CudaCapture

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny_models import MOE, make_model, token_ids
from varied_models import LENGTH, left_padded, varied_model

NAMES = ("llama", "qwen3", "mixtral", "gemma3", "gpt-oss", "gemma3+sliding", "gpt-oss+sliding")


def ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return token_ids(batch, length).cuda()


def model_of(name: str) -> Any:
    model = varied_model(name).cuda()
    enable_cuda_graphs(model)
    return model


def state_of(model: Any) -> Any:
    return model.get_compiled_call.__self__


def graphs_of(model: Any) -> list[Any]:
    """The captured graphs of a model.

    Raises:
        AssertionError: there is none.
    """
    state = state_of(model)
    assert state._failure is None, state._failure
    assert state._session is not None, "no graph was tried"
    graphs = [graph for graph in state._session._graphs.values() if graph._replay is not None]
    assert graphs, "nothing was captured"
    return graphs


def plain(model: Any, **options: Any) -> Any:
    return model.generate(disable_compile=True, **options)


def same_tokens(model: Any, seed: int = 3, **options: Any) -> None:
    torch.manual_seed(seed)
    expected = plain(model, **options)
    for call in range(2):
        torch.manual_seed(seed)
        got = model.generate(**options)
        assert torch.equal(got, expected), f"call {call}:\n{got.tolist()}\nexpected\n{expected.tolist()}"
    graphs_of(model)


def greedy(name: str) -> None:
    model = model_of(name)
    same_tokens(model, inputs=ids(1), do_sample=False, max_new_tokens=30)
    padded = {key: value.cuda() for key, value in left_padded().items()}
    same_tokens(model, **padded, do_sample=False, max_new_tokens=30)


def sampling() -> None:
    model = model_of("llama")
    padded = {key: value.cuda() for key, value in left_padded().items()}
    same_tokens(model, **padded, do_sample=True, top_k=10, temperature=0.8, max_new_tokens=30)
    same_tokens(model, inputs=ids(), do_sample=True, num_return_sequences=3, max_new_tokens=30)


def lengths_and_batches() -> None:
    model = model_of("gemma3+sliding")
    for batch, length, new in ((1, 9, 5), (1, 20, 9), (4, 9, 9), (1, 300, 20), (16, 9, 9), (2, 1, 12)):
        same_tokens(model, inputs=ids(batch, length), do_sample=False, max_new_tokens=new)


def growth() -> None:
    bucket, room = decode_cache.bucket, decode_cache._ROOM
    decode_cache.bucket, decode_cache._ROOM = (lambda length: -(-length // 8) * 8), 8
    try:
        for name in ("llama", "gpt-oss+sliding"):
            same_tokens(model_of(name), inputs=ids(), do_sample=False, max_new_tokens=50)
    finally:
        decode_cache.bucket, decode_cache._ROOM = bucket, room


def stopping() -> None:
    model = model_of("llama")
    free = plain(model, inputs=ids(3), do_sample=False, max_new_tokens=30)
    stop = free[:, LENGTH + 6].tolist()
    for minimum in (1, 12):
        options = dict(min_new_tokens=minimum, eos_token_id=stop, do_sample=False, max_new_tokens=30)
        same_tokens(model, inputs=ids(3), **options)


def scores_and_cache() -> None:
    model = model_of("gemma3+sliding")
    options: dict[str, Any] = dict(inputs=ids(), do_sample=False, max_new_tokens=14, output_logits=True)
    options |= dict(return_dict_in_generate=True, output_scores=True)
    expected, got = plain(model, **options), model.generate(**options)
    model.generate(inputs=ids(2, 5), do_sample=False, max_new_tokens=14)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)
    follow_up = torch.cat([got.sequences, ids(2, 4)], dim=1)
    more: dict[str, Any] = dict(inputs=follow_up, do_sample=False, max_new_tokens=9)
    continued = model.generate(past_key_values=got.past_key_values, **more)
    assert torch.equal(continued, plain(model, past_key_values=expected.past_key_values, **more))


def fallbacks() -> None:
    model = model_of("llama")
    for option in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "dynamic"}):
        options: dict[str, Any] = dict(inputs=ids(1), do_sample=False, max_new_tokens=8, **option)
        assert torch.equal(model.generate(**options), plain(model, **options))
    assert state_of(model)._session is None


def capture_failure(rehearsed: bool) -> None:
    """A model that reads a value back cannot be captured, and must work all the same, now and later."""
    model = model_of("llama")
    rotary = model.model.rotary_emb
    forward = type(rotary).forward

    def reads_back(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        position_ids.max().item()
        return forward(self, x, position_ids)

    class Unrehearsed(CudaCapture):
        @staticmethod
        def rehearse(function: Callable[[], Any]) -> tuple[Any, str | None]:
            return function(), None

    rotary.__class__ = type("Rotary", (type(rotary),), {"forward": reads_back})
    if not rehearsed:
        state_of(model).capture = Unrehearsed
    options: dict[str, Any] = dict(inputs=ids(), do_sample=True, max_new_tokens=12)
    torch.manual_seed(3)
    expected = plain(model, **options)
    for _ in range(2):
        torch.manual_seed(3)
        assert torch.equal(model.generate(**options), expected)
    print(state_of(model)._failure)
    assert "cannot be captured" in state_of(model)._failure
    same_tokens(model_of("llama"), **options)


def changed_weights() -> None:
    model = model_of("llama")
    for _ in range(2):
        same_tokens(model, inputs=ids(), do_sample=False, max_new_tokens=12)
        model.load_state_dict({key: value.flip(0) for key, value in model.state_dict().items()})
    same_tokens(model.half().float(), inputs=ids(), do_sample=False, max_new_tokens=12)


def copies() -> None:
    model = model_of("llama")
    options: dict[str, Any] = dict(inputs=ids(), do_sample=False, max_new_tokens=12)
    same_tokens(model, **options)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_tokens(twin, **options)


def inference_mode() -> None:
    model = model_of("llama")
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            same_tokens(model, inputs=ids(), do_sample=False, max_new_tokens=6)


def threads() -> None:
    model = model_of("llama")
    options: dict[str, Any] = dict(do_sample=False, max_new_tokens=40)
    expected = [plain(model, inputs=ids(1 + i, 5 + i), **options) for i in range(2)]
    results: list[Any] = [None, None]

    def work(index: int) -> None:
        results[index] = model.generate(inputs=ids(1 + index, 5 + index), **options)

    running = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def streaming() -> None:
    class Digits:
        def decode(self, tokens: Any, **options: Any) -> str:
            return "".join(f"{int(token)} " for token in tokens)

    model = model_of("llama")
    options: dict[str, Any] = dict(inputs=ids(1), do_sample=False, max_new_tokens=20)
    expected = plain(model, **options)[0, LENGTH:].tolist()
    for _ in range(2):
        streamer = TextIteratorStreamer(Digits(), skip_prompt=True)  # type: ignore[arg-type]
        thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert [int(word) for word in text.split()] == expected
    graphs_of(model)


def int4(name: str) -> None:
    """An int4 model's graphs give, bit for bit, what the same steps give without a capture."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(name).save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=HadaCoreConfig())
    options: dict[str, Any] = dict(inputs=ids(3), do_sample=False, max_new_tokens=20, output_logits=True)
    options |= dict(return_dict_in_generate=True)
    captured = [model.generate(**options) for _ in range(2)]
    if state_of(model)._failure is not None and name in MOE:
        print(f"{name}: {state_of(model)._failure}")
        return
    graphs_of(model)
    disable_cuda_graphs(model)
    enable_cuda_graphs(model)

    class Eager(CudaCapture):
        @staticmethod
        def rehearse(function: Callable[[], Any]) -> tuple[Any, str | None]:
            return function(), "not wanted"

    state_of(model).capture = Eager
    reference = model.generate(**options)
    for got in captured:
        assert torch.equal(got.sequences, reference.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, reference.logits, strict=True))


def memory_is_freed() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = model_of("llama")
    same_tokens(model, inputs=ids(), do_sample=False, max_new_tokens=12)
    del model
    # Nothing but what cuBLAS keeps.
    held = torch.cuda.memory_allocated() - before
    assert held < 64 * 2**20, f"{held / 2**20:.1f} MiB"


def step_times() -> str:
    """Host time of a step: a tiny model leaves the GPU nothing to do."""
    lines = []
    for batch, sample in ((1, False), (16, False), (1, True)):
        model = varied_model("llama").cuda()
        enable_cuda_graphs(model)
        options: dict[str, Any] = dict(do_sample=sample, top_k=50 if sample else None, pad_token_id=0)
        options |= dict(inputs=ids(batch), eos_token_id=1)
        model.generate(max_new_tokens=8, min_new_tokens=8, **options)
        spent: list[float] = []
        step = DecodeGraphs._step

        def timed(self: Any, step: Any = step, spent: list[float] = spent, **inputs: Any) -> Any:
            start = time.perf_counter()
            output = step(self, **inputs)
            spent.append(time.perf_counter() - start)
            return output

        times = {}
        for new in (1, 201):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(max_new_tokens=new, min_new_tokens=new, **options)
            torch.cuda.synchronize()
            times[new] = time.perf_counter() - start
        DecodeGraphs._step = timed  # type: ignore[method-assign]
        try:
            model.generate(max_new_tokens=101, min_new_tokens=101, **options)
        finally:
            DecodeGraphs._step = step  # type: ignore[method-assign]
        (graph,) = graphs_of(model)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(50):
            graph._replay()
        end.record()
        torch.cuda.synchronize()
        whole, inside = (times[201] - times[1]) / 200 * 1e6, sorted(spent)[len(spent) // 2] * 1e6
        lines.append(
            f"batch {batch:2d} {'sampling' if sample else 'greedy  '}: whole step {whole:.0f} us, of which "
            f"_step() {inside:.0f} us on the host; replay {begin.elapsed_time(end) / 50 * 1e3:.0f} us"
        )
    return "\n".join(lines)


CASES: dict[str, Callable[[], Any]] = {
    **{f"greedy {name}": partial(greedy, name) for name in NAMES},
    "sampling": sampling,
    "lengths and batches": lengths_and_batches,
    "growth": growth,
    "stopping": stopping,
    "scores and cache": scores_and_cache,
    "fallbacks": fallbacks,
    "no capture of what waits": partial(capture_failure, True),
    "a failed capture": partial(capture_failure, False),
    "changed weights": changed_weights,
    "copies": copies,
    "inference mode": inference_mode,
    "threads": threads,
    "streaming": streaming,
    "memory is freed": memory_is_freed,
    **{f"int4 {name}": partial(int4, name) for name in ("llama", "gemma3", "mixtral")},
}


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    failed = []
    for name, case in CASES.items():
        begin = time.perf_counter()
        try:
            case()
        except Exception:
            failed.append(name)
            print(f"--- {name}")
            traceback.print_exc()
        print(
            f"{name}: {'FAILED' if name in failed else 'ok'} ({time.perf_counter() - begin:.1f} s)",
            flush=True,
        )
    try:
        print(step_times())
    except Exception:
        failed.append("step times")
        traceback.print_exc()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}: {len(CASES) + 1 - len(failed)} of {len(CASES) + 1} ok in "
        f"{time.perf_counter() - start:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    typer.run(main)
