"""Dense against packed on this machine, layer by layer and whole sampling steps, as ratios of interleaved runs.

Every model counts as it runs fastest: eager, channels-last, compiled, or compiled with frozen weights, which Inductor then lays
out beforehand. Models without packed layers, dense or pruned, also run converted to oneDNN by `torch.utils.mkldnn.to_mkldnn`. Few
people convert models so, but on CPUs that MKL serves badly oneDNN's linear layers are twice as fast as PyTorch's own.
"""

import contextlib
import copy
import itertools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils import mkldnn

from ..checkpoints import folders
from ..masking import layers, nm
from ..models import dryrun, papers, students
from ..packing import packed
from ..support import latency, markdown
from . import macs, sizes

# Layers of U-ViT-S/2 (1,028 tokens: four CIFAR-10 pictures) and of UNets with four pictures. Linear layers are (in, out),
# convolutions (in, out, kernel size, height and width of the maps).
LINEAR = ((512, 2048), (2048, 512), (512, 1536))
CONVOLUTION = ((128, 128, 3, 32), (256, 256, 3, 16), (256, 256, 3, 8), (256, 256, 1, 16))
TOKENS, IMAGES = 1028, 4


def machine(device: str | torch.device = "cpu") -> dict:
    """The processor, the threads and the version of torch, on which times depend."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    facts = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions; other processors have other keys
    return {
        "machine": platform.machine(), "processor": facts.get("cpu_name", ""), "cpu": torch.backends.cpu.get_cpu_capability(),
        "amx": facts.get("amx_tile", False), "torch": torch.__version__, "threads": torch.get_num_threads(), **gpu,
    }  # fmt: skip


def all_threads(device: str | torch.device = "cpu") -> tuple[int, ...]:
    """One thread, and as many as torch takes by default; these alone if another device computes."""
    most = torch.get_num_threads()
    return (1, most) if most > 1 and torch.device(device).type == "cpu" else (most,)


def measure_layers(
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    threads: Sequence[int] = (),
    rounds: int = 61,
    shapes: Sequence[tuple[int, ...]] = LINEAR + CONVOLUTION,
    tokens: int = TOKENS,
    device: str | torch.device = "cpu",
) -> Iterator[dict]:
    """Times of single 2:4 layers with random weights, one row each; linear layers get `tokens` tokens.

    torch has few sparse kernels for GPUs: layers that no kernel serves are left out there.

    Raises:
        ValueError: no kernel serves a layer on this CPU (`kernels.why_not` says so beforehand).
    """
    for count, name in itertools.product(threads or all_threads(device), dtypes):
        for layer, x in _layers(torch.device(device), getattr(torch, name), shapes, tokens):
            if x.is_cuda and packed.why_not(layer, nm.NMPattern.parse("2:4")):
                continue
            with with_threads(count):
                packed_layer = packed.packed_layer(layer, "2:4")
                call = lambda model, x=x: model(x)  # noqa: E731
                variants = {**_formats("dense", layer), **onednn("dense", layer, call), "packed": packed_layer}
                row = timed(variants, call, rounds)
            yield {"what": _title(layer, x), "threads": count, "dtype": name, **row}


def _layers(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], tokens: int
) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs, *spatial in shapes:
        if spatial:
            kernel, size = spatial
            layer, shape = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), (IMAGES, inputs, size, size)
        else:
            layer, shape = nn.Linear(inputs, outputs), (tokens, inputs)
        yield _sparse(layer).to(device, dtype), torch.randn(shape, generator=generator).to(device, dtype)


def _sparse(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(nm.masked(layer.weight, nm.mask(layer.weight, "2:4")))
    return layer.eval()


def _title(layer: nn.Module, x: torch.Tensor) -> str:
    if isinstance(layer, nn.Linear):
        return f"linear {layer.in_features}x{layer.out_features}, {len(x):,} tokens"
    kernel = "x".join(map(str, layer.kernel_size))
    return f"conv {kernel} {layer.in_channels}x{layer.out_channels}, {len(x)} maps of {x.shape[2]}x{x.shape[3]}"


def measure_steps(
    models: Sequence[str] = ("glyphs-uvit", "glyphs-unet"),
    batches: Sequence[int] = (1, 4, 16),
    dtypes: Sequence[str] = ("float32",),
    threads: Sequence[int] = (),
    compiled: bool = True,
    rounds: int = 15,
    device: str | torch.device = "cpu",
) -> Iterator[dict]:
    """Times of one sampling step, one row per model, batch, dtype and number of threads.

    Bundled models are compared with their 2:4 student, and with the pruned one; the papers' configurations get random weights,
    one-shot masked, which take the same time.
    """
    check(models)
    for name, dtype, count, batch in itertools.product(models, dtypes, threads or all_threads(device), batches):
        with with_threads(count):
            dense, fast = pair(name, getattr(torch, dtype), batch, device)
            pruned = _pruned(name, getattr(torch, dtype), device)
            step = compare(f"{name}, batch {batch}", {"dense": dense, "packed": fast, **pruned}, batch, compiled, rounds)
            torch.compiler.reset()
        yield {"threads": count, "dtype": dtype, **step}


def compare(what: str, models: Mapping[str, nn.Module], batch: int, compiled: bool, rounds: int) -> dict:
    """Times of one call of the models "dense", "packed" and perhaps "pruned", called `what`, as a row."""
    dense, fast = models["dense"], models["packed"]
    inputs = randomised(dryrun.example_inputs(dense, batch))
    variants = ways(models, inputs, compiled)
    row = timed(variants, lambda model: model(**inputs), rounds)
    skipped = 1 - macs.count(fast).executed / macs.count(dense).dense
    return {"what": what, **row, "macs_skipped": skipped, "weight_bytes": sizes.memory(fast) / sizes.memory(dense)}


def ways(models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], compiled: bool) -> dict[str, nn.Module]:
    """Every model, called by its kind in `models`, in all ways in which it may run fastest, by the variants' names."""
    variants = {}
    for name, model in models.items():
        variants |= _formats(name, model)
        if not packed.has_packed(model):
            variants |= onednn(name, model, lambda model: model(**inputs))
        if compiled:
            variants[str(Variant(name, "compiled"))] = torch.compile(model)
            variants |= _frozen(name, model)
    return variants


def _pruned(name: str, dtype: torch.dtype, device: str | torch.device) -> dict[str, nn.Module]:
    return (
        {"pruned": cast(folders.load(f"{name}-diffpruned"), dtype, device)} if f"{name}-diffpruned" in folders.bundled() else {}
    )


def check(models: Sequence[str]) -> None:
    """Raise ValueError or FileNotFoundError, before the first of them is measured, if a name is none that `pair` takes."""
    for name in models:
        if name not in papers.PAPER_MODELS:
            folders.read_json(folders.weights_of(name).parent / folders.CONFIG)


def pair(name: str, dtype: torch.dtype, batch: int, device: str | torch.device = "cpu") -> tuple[nn.Module, nn.Module]:
    """A model and its packed counterpart: the bundled 2:4 student, the model itself if it is N:M, or the model masked 2:4.

    `name` is a bundled model, a paper's configuration (with fresh weights) or a model folder.
    """
    dense = cast(papers.build(name) if name in papers.PAPER_MODELS else folders.load(name), dtype, device)
    sparse = cast(folders.load(f"{name}-2x4"), dtype, device) if f"{name}-2x4" in folders.bundled() else copy.deepcopy(dense)
    if not layers.patterns(sparse):
        layers.fold(students.sparsify(sparse, "2:4"))
    return dense, packed.pack(sparse, batch=batch)


def cast(model: nn.Module, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """The model in `dtype` on `device`, without the warning that diffusers' own `to` gives."""
    return nn.Module.to(model, device, dtype)


def randomised(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random numbers in place of zeros, because some processors multiply zeros faster."""
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in inputs.items()}


class Variant(NamedTuple):
    """A model and the way it runs; as text, in results files, "dense" or "dense, compiled".

    Attributes:
        kind: "dense", "packed", "pruned", or "dense shallow" and "packed shallow" for calls without the deep blocks.
        way: "eager", "channels last", "compiled", "frozen" or "oneDNN".
    """

    kind: str
    way: str = "eager"

    def __str__(self) -> str:
        return self.kind if self.way == "eager" else f"{self.kind}, {self.way}"

    @classmethod
    def parse(cls, text: str) -> "Variant":
        return cls(*text.split(", "))


ONEDNN = str(Variant("dense", "oneDNN"))


def onednn(name: str, model: nn.Module, call: Callable[[nn.Module], object]) -> dict[str, nn.Module]:
    """The model converted to oneDNN, by its variant's name; {} if the converted model does not run."""
    first = next(model.parameters())
    if first.device.type != "cpu":
        return {}
    converted = mkldnn.to_mkldnn(copy.deepcopy(model), first.dtype)
    with contextlib.suppress(RuntimeError, AttributeError), torch.no_grad():  # a model that looks at its layers' weights
        call(converted)
        return {str(Variant(name, "oneDNN")): converted}
    return {}


class _Frozen(nn.Module):
    """A model in a class of its own: torch would take the graph compiled for another model of the same class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **inputs):
        return self.model(*args, **inputs)


def _frozen(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """A copy of the model, compiled with its weights as constants, by its variant's name; {} on other devices than the CPU."""
    if next(model.parameters()).device.type != "cpu":
        return {}
    copied = _Frozen(copy.deepcopy(model)).eval()
    return {str(Variant(name, "frozen")): torch.compile(copied, options={"freezing": True})}


def _formats(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """The model, and if it has convolutions larger than 1x1, a copy in channels-last format."""
    if not any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in model.modules()):
        return {name: model}
    return {name: model, str(Variant(name, "channels last")): copy.deepcopy(model).to(memory_format=torch.channels_last)}


def timed(variants: Mapping[str, nn.Module], call, rounds: int) -> dict:
    """Milliseconds (median and quartiles) of every variant, and how much faster the fastest packed one is (median of rounds).

    `speedup` is over the fastest dense variant that is not converted to oneDNN, `speedup_over_onednn` over the converted one.
    `speedup_best` compares the fastest variants of both, converted or not.
    """
    with torch.no_grad():
        timings = latency.interleaved({name: lambda m=model: call(m) for name, model in variants.items()}, rounds=rounds)
    ms = {name: timing.median * 1e3 for name, timing in timings.items()}
    dense, fast, pruned = (fastest(ms, kind, converted=False) for kind in ("dense", "packed", "pruned"))
    best = [fastest(ms, kind) for kind in ("dense", "packed")]
    return {
        "ms": ms,
        "quartiles": {name: [seconds * 1e3 for seconds in timing.spread] for name, timing in timings.items()},
        "fastest_dense": dense,
        "fastest_packed": fast,
        "speedup": latency.ratio(timings, dense, fast),
        "speedup_over_onednn": latency.ratio(timings, ONEDNN, fast) if ONEDNN in timings else None,
        "speedup_best": latency.ratio(timings, *best),
        "fastest_pruned": pruned,
        "speedup_pruned": latency.ratio(timings, dense, pruned) if pruned else None,
    }


def fastest(ms: Mapping[str, float], kind: str, converted: bool = True) -> str | None:
    """The variant of this kind that takes the fewest milliseconds, of those `converted` to oneDNN too; None without a variant."""
    variants = {name: Variant.parse(name) for name in ms}
    names = [name for name, variant in variants.items() if variant.kind == kind and (converted or variant.way != "oneDNN")]
    return min(names, key=ms.__getitem__, default=None)


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """`count` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


HEAD = ("", "dtype", "threads", "dense ms", "oneDNN ms", "packed ms", "speed-up", "over oneDNN")
METHODS_HEAD = ("best of each",)
PRUNED_HEAD = ("pruned ms", "speed-up")


def words(result: Mapping) -> str:
    """The rows of a result as a Markdown table."""
    rows = result["rows"]
    methods, pruned = (any(row.get(key) for row in rows) for key in ("name", "fastest_pruned"))
    head = (*HEAD, *(METHODS_HEAD if methods else ()), *(PRUNED_HEAD if pruned else ()))
    return markdown.table(head, (_cells(row, methods, pruned) for row in rows))


def line(row: Mapping) -> str:
    """One row alone, as it is measured."""
    return markdown.line(_cells(row, "name" in row, bool(row.get("fastest_pruned"))))


def _cells(row: Mapping, methods: bool, pruned: bool) -> list:
    ms, over = row["ms"], row["speedup_over_onednn"]
    cells = [
        row["what"], row["dtype"], row["threads"], _named(ms, row["fastest_dense"]), f"{ms[ONEDNN]:.2f}" if over else "",
        _named(ms, row["fastest_packed"]), f"**{row['speedup']:.2f}x**", f"{over:.2f}x" if over else "",
    ]  # fmt: skip
    if methods:
        cells.append(f"{row['speedup_best']:.2f}x")
    if pruned:
        cells += [_named(ms, row["fastest_pruned"]), f"{row['speedup_pruned']:.2f}x"] if row.get("fastest_pruned") else ["", ""]
    return cells


def _named(ms: Mapping[str, float], variant: str) -> str:
    return f"{ms[variant]:.2f} ({Variant.parse(variant).way})"
