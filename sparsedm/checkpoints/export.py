"""Models for other programs: folders for diffusers, packed folders, and ONNX files.

ONNX files have the N:M zeros in place, for runtimes that use them (TensorRT's sparse tactics). docs/deployment.md tells which
format is for whom.
"""

import contextlib
import copy
import glob
import importlib.util
import json
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from ..masking import layers, nm
from ..masking.nm import NMPattern
from ..models import dryrun
from ..models.denoisers import null_label
from ..packing import packed
from ..support.files import replacing
from . import folders

FORMATS = ("diffusers", "packed", "onnx")
INPUTS = ("sample", "timestep", "class_labels", "encoder_hidden_states")
OUTPUT = "out_sample"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}  # largest error that passes, relative to the largest output
CHECKED_BATCHES = (1, 2, 5)
ONE_FILE = 2**31 - 2**24  # bytes of weights that still fit into one file: protobuf ends at 2 GiB
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def write(model: nn.Module, out: str | Path, format: str, dtype: str | None = None, *, batch: int | None = None) -> None:
    """Write a model that is dense, in sparse training, folded or packed in one of FORMATS; the model is not touched.

    "diffusers" is `sparsedm.save`, "packed" `sparsedm.save_packed`, "onnx" the function `onnx`. `dtype` is in folders.DTYPES, by
    default float16 for "packed", else float32. An earlier model folder at `out` is replaced, another folder is not.

    Raises:
        ValueError: unknown format or dtype, a `batch` for a folder, nothing to pack, a folder in the way that holds other
            things, or as `onnx`.
        ImportError, OSError: as `onnx`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    weights = folders.dtype_of(dtype or ("float16" if format == "packed" else "float32"))
    if format == "onnx":
        onnx(model, out, batch=batch, dtype=weights)
        return
    if batch is not None:
        raise ValueError(f"a fixed batch is for onnx; {format} folders take any")
    if format == "packed" and not (layers.patterns(model) or packed.has_packed(model)):
        raise ValueError("the model has no N:M sparse layer to pack; sparsify it first, or export it as diffusers")
    save = folders.save if format == "diffusers" else folders.save_packed
    save(model, out, weights)


def onnx(
    model: nn.Module,
    path: str | Path,
    *,
    batch: int | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> None:
    """Write one call of a denoiser as an ONNX file, whole or not at all.

    The model may be dense, in sparse training, folded or packed, and is not touched. The file's inputs are named like the
    arguments of the call: sample [B, C, H, W], timestep [B], and class_labels [B] or encoder_hidden_states [B, tokens, dim]
    if the model takes them; the output is out_sample [B, C, H, W]. The noise schedule is in the metadata. Weights beyond
    2 GiB are in a second file, `PATH.<8 letters>.data`. Every N:M weight is verified in the written file.

    Args:
        batch: a fixed B; by default B is dynamic.
        inputs: keyword arguments of one call, B first, for models whose config does not tell their shapes. The values of the
            tensors do not matter.
        dtype: of the weights, the sample and the text: float32 or float16. The timestep stays an integer.
        check: run the file with onnxruntime and compare it with torch, for several random inputs and batch sizes.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: bad arguments; a weight that is not N:M in the file (the layer is named); a file that onnxruntime does not
            run, or whose outputs are not the model's. An earlier file is untouched then.
        OSError: the file cannot be written; an earlier file is untouched.
    """
    _require(PACKAGES if check else PACKAGES[:2])
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the ONNX file")
    if dtype not in TOLERANCE:
        raise ValueError(f"ONNX files are written in float32 or float16, not {str(dtype).removeprefix('torch.')}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, it is {batch}")
    plain, patterns = _plain(model, dtype)
    inputs = _checked_inputs(plain, inputs)
    program = trace(plain, _draw(plain, inputs, batch or 2), dynamic=batch is None)
    with _written(program, path) as temporary:
        _verify_weights(temporary, plain, patterns)
        if check:
            _compare(temporary, plain, inputs, CHECKED_BATCHES if batch is None else (batch,) * len(CHECKED_BATCHES))


class _Denoiser(nn.Module):
    """A diffusers denoiser that returns its output as a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sample, timestep, class_labels=None, encoder_hidden_states=None) -> torch.Tensor:
        extras = {"class_labels": class_labels, "encoder_hidden_states": encoder_hidden_states}
        given = {name: value for name, value in extras.items() if value is not None}
        return self.model(sample=sample, timestep=timestep, **given, return_dict=False)[0]


def _require(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install {' '.join(PACKAGES)}")


def _plain(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, NMPattern]]:
    """A folded and unpacked copy on the CPU, in `dtype` and eval mode, and the patterns of its N:M layers."""
    plain = packed.unpack(copy.deepcopy(model)).cpu()
    patterns = layers.patterns(plain)
    return nn.Module.to(layers.fold(plain), dtype).eval(), patterns  # diffusers' own `to` warns about nothing


def _checked_inputs(model: nn.Module, inputs: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
    """`inputs`, or the inputs that the model's config implies, after a call of the model with them."""
    inputs = dryrun.example_inputs(model) if inputs is None else inputs
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or not {"sample", "timestep"} <= set(inputs):
        raise ValueError(f"inputs are {', '.join(inputs)}; a denoiser takes sample, timestep and perhaps {', '.join(INPUTS[2:])}")
    try:
        with torch.no_grad():
            _Denoiser(model)(**_draw(model, inputs, 1))
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} does not take the inputs {', '.join(inputs)}: {error}") from error
    return inputs


def _draw(model: nn.Module, inputs: Mapping[str, torch.Tensor], batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values of the shapes and kinds of `inputs` for `batch` pictures, in the order of INPUTS."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in (name for name in INPUTS if name in inputs):
        shape, dtype = (batch, *inputs[name].shape[1:]), inputs[name].dtype
        if dtype.is_floating_point and name != "timestep":
            drawn[name] = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
        else:
            end = 1000 if name == "timestep" else (null_label(model) or 0) + 1
            drawn[name] = torch.randint(end, shape, generator=generator).to(dtype)
    return drawn


def trace(model: nn.Module, example: dict[str, torch.Tensor], dynamic: bool):
    """The call as an `onnx_ir.Model`, optimised; its weights are called as in the state dict, transposed ones with ".T"."""
    dynamic_axes = {name: {0: torch.export.Dim.DYNAMIC} for name in example} if dynamic else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # strict, because without it a `len(x)` in the model (U-ViT has some) makes the batch a constant
        traced = torch.export.export(_Denoiser(model), (), example, dynamic_shapes=dynamic_axes, strict=True)
        names = {"input_names": list(example), "output_names": [OUTPUT]}
        batches = {name: {0: "batch"} for name in example} if dynamic else None
        options = {"dynamo": True, "optimize": False, "verbose": False, "dynamic_shapes": batches}
        program = torch.onnx.export(traced, (), kwargs=example, **names, **options)
        _name_weights(program.model.graph)
        program.optimize()
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    schedule = getattr(model.config, "noise_schedule", None)
    if schedule is not None:
        program.model.metadata_props["noise_schedule"] = json.dumps(dict(schedule))
    return program.model


def _name_weights(graph) -> None:
    """Drop the wrapper from the names of weights, and name their transposes, which the optimiser is about to compute."""
    for name in list(graph.initializers):
        graph.initializers[name].name = name.removeprefix("model.")
    named = set()
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" and node.inputs[0].is_initializer() else None
        if weight is not None and weight not in named:  # a layer that runs twice has two transposes
            node.outputs[0].name = f"{weight.name}.T"
            named.add(weight)


@contextlib.contextmanager
def _written(program, path: Path) -> Iterator[Path]:
    """Yield the written file, still beside `path`; the file takes its place at `path` if nothing is raised.

    Weights beyond ONE_FILE go to another file, under a new name each time: an earlier model keeps its weights until then.
    """
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    data = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.data") if size > ONE_FILE else None
    try:
        with replacing(path) as temporary:
            onnx_ir.save(program, temporary, external_data=data and data.name)
            yield temporary
    except BaseException:
        if data:
            data.unlink(missing_ok=True)
        raise
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.data"):
        if old != data:
            old.unlink()


def _verify_weights(path: Path, model: nn.Module, patterns: Mapping[str, NMPattern]) -> None:
    """Raise ValueError, naming the layer, unless the file multiplies by an N:M weight for every layer in `patterns`."""
    weights = _weights(path)
    for name, pattern in patterns.items():
        weight, shape = weights.get(name), model.get_submodule(name).weight.shape
        if weight is None or weight.shape != shape:
            raise ValueError(f"{name}: its {pattern} weight {tuple(shape)} is no longer one tensor in the ONNX graph")
        broken = nm.verify(weight, pattern)
        if broken:
            raise ValueError(f"{name}: {broken} groups of its weight in the ONNX graph are not {pattern}")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """The constant second operands of the file's products as [out, in, ...], by layer."""
    import onnx_ir

    weights = {}
    for node in onnx_ir.load(path).graph:
        value = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if value is None or value.const_value is None:
            continue
        weight = torch.from_numpy(value.const_value.numpy().copy())
        outputs_last = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
        weights[value.name.removesuffix(".T").removesuffix(".weight")] = weight.mT if outputs_last else weight
    return weights


def _compare(path: Path, model: nn.Module, inputs: Mapping[str, torch.Tensor], batches: tuple[int, ...]) -> None:
    """Raise ValueError unless onnxruntime computes from the file what torch computes from the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        outputs = []
        for seed, batch in enumerate(batches):
            drawn = _draw(model, inputs, batch, seed)
            (output,) = session.run([OUTPUT], {name: value.numpy() for name, value in drawn.items()})
            outputs.append((drawn, torch.from_numpy(output)))
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ValueError(f"onnxruntime does not run the exported model: {error}") from error
    for drawn, output in outputs:
        with torch.no_grad():
            expected = _Denoiser(model)(**drawn)
        error = relative_error(output, expected)
        if not error <= tolerance:
            raise ValueError(
                f"onnxruntime's output differs from torch's by {error:.2g} at batch {len(expected)} (limit {tolerance:g})"
            )


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite for another shape or type."""
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return float("inf")
    largest = expected.double().abs().max().clamp(min=1e-30)  # not 0: some networks begin with an output of zeros
    return float((output.double() - expected.double()).abs().max() / largest)
