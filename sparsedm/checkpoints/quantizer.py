"""The plug-in of diffusers: `from_pretrained` reads packed folders, and makes dense models N:M sparse while loading them.

While a packed file is read, a layer keeps its module, which has the parameter `values` and the buffer `positions` in the place of
its `weight`; which layers these are stands in the file's metadata.

This file is imported together with `diffusers.quantizers.auto`, when most of diffusers is not there yet: what needs a whole
diffusers is imported in functions.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ..masking.nm import NMPattern
from ..packing import tensors
from ..packing.tensors import QUANTIZER as NAME
from ..support import tensorfiles

DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Method(StrEnum):  # diffusers reads its `value`
    SPARSEDM = NAME


class NMConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=NMConfig("2:4", method="obs"))` does to a dense diffusers model.

    The model is N:M sparse when `from_pretrained` returns. "magnitude" takes any model. The other methods are calibrated while
    loading, without data, as `sparsedm.calibrate` does: on pictures that the model draws itself, on the noise schedule of its
    config or of the pipeline that its folder lies in. A model whose drawing needs a text is refused: load the model dense, and
    call `sparsedm.calibrate(pipeline.unet, lambda: pipeline(prompts), ...)`.

    For the parts of a pipeline: `PipelineQuantizationConfig(quant_mapping={"unet": NMConfig("2:4")})`. A folder whose weights are
    packed already says so in its config, which diffusers prefers to an argument.

    Attributes:
        pattern: N:M for every layer.
        method: "magnitude", "wanda", "obs" or "admm".
        pack: call `sparsedm.pack` after loading, which packs the layers that run faster so on this machine; not saved.
        n: how many inputs of the model calibration takes.
        seed: of the noise in calibration.
        include, exclude, overrides: which layers, as in `sparsedm.sparsify`.
    """

    def __init__(
        self,
        pattern: str | NMPattern = "2:4",
        method: str = "admm",
        pack: bool = False,
        n: int = 1024,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        overrides: Mapping[str, str | NMPattern] | None = None,
        quant_method: str = NAME,
    ):
        """Raises ValueError for a pattern that is not N:M with N < M."""
        self.quant_method = _Method(quant_method)
        self.pattern, self.method, self.pack, self.n, self.seed = str(NMPattern.sparse(pattern)), method, pack, n, seed
        self.include, self.exclude = list(include), None if exclude is None else list(exclude)
        self.overrides = None if overrides is None else {name: str(value) for name, value in overrides.items()}

    def to_dict(self) -> dict:
        """How the weights were made, for config.json: what is not as by default. Packing is a matter of each machine."""
        default = vars(NMConfig()) | {"quant_method": None, "pack": self.pack}
        return {key: value for key, value in vars(self).items() if value != default[key]}

    to_diff_dict = to_dict


class NMQuantizer(DiffusersQuantizer):
    """Reads packed folders into plain layers, bit for bit; makes the layers of other models sparse, as an `NMConfig` says.

    Saving packs the N:M sparse weights that the model has then.
    """

    use_keep_in_fp32_modules = True
    is_serializable = is_trainable = is_compileable = True

    def __init__(self, quantization_config: NMConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._files, self._layers, self._checksums = [], {}, None

    def validate_environment(self, torch_dtype: torch.dtype | None = None, device_map: Mapping | None = None, **kwargs) -> None:
        """Raise ValueError for an unknown method, and for a dtype or a `device_map` that is not for N:M sparse layers."""
        if not self.pre_quantized:
            from ..training.calibrate import METHODS

            if self.quantization_config.method not in METHODS:
                raise ValueError(f"method {self.quantization_config.method!r} is none of {', '.join(METHODS)}")
        if torch_dtype not in DTYPES:
            raise ValueError(f"torch_dtype {torch_dtype} is not for N:M sparse layers; take float32, bfloat16 or float16")
        places = set(map(str, device_map.values())) if isinstance(device_map, Mapping) else set()
        if len(places) > 1 or "disk" in places:
            remedy = "load it onto one, such as device_map='cpu'"
            raise ValueError(f"device_map puts an N:M sparse model onto several devices ({', '.join(sorted(places))}); {remedy}")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        if self.pre_quantized and self._files[0].suffix == ".safetensors":
            metadata = tensorfiles.read_metadata(self._files[0])
            if tensors.is_packed(metadata):
                self._layers = tensors.packed_layers(self._files[0], metadata)
                self._checksums = metadata[tensorfiles.CHECKSUMS]
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._checksums:
            tensorfiles.check(self._folder, state_dict, self._checksums, part=True)
        return state_dict

    @property
    def _folder(self) -> Path:
        return self._files[0].parent

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        if not self._files:
            raise ValueError(f"this diffusers does not tell which files it loads; upgrade it to 0.41, or use {NAME}.load")
        for name, layer in self._layers.items():
            try:
                _hold(model.get_submodule(name), NMPattern.parse(layer["pattern"]), layer["shape"])
            except Exception as error:  # of any kind: the metadata may say anything
                remedy = f"fetch or save it again; if its channels are pruned, load it with {NAME}.load"
                raise ValueError(f"{self._folder}: {name} is not as in {type(model).__name__} ({error}); {remedy}") from error

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        from ..packing.packed import pack

        for name, layer in self._layers.items():
            try:
                _release(model.get_submodule(name), layer["pattern"], layer["shape"])
            except ValueError as error:
                raise ValueError(f"{self._folder}: {name} cannot be unpacked: {error}; fetch or save it again") from error
        self._layers, self._checksums = {}, None
        model.is_quantized = False  # its layers are plain ones: `to(dtype)` may cast them
        if not self.pre_quantized:
            self._sparsify(model)
        if self.quantization_config.pack:
            pack(model)

    def _sparsify(self, model: nn.Module) -> None:
        from ..masking.layers import fold
        from ..models.students import sparsify
        from ..training.calibrate import calibrate
        from .folders import take_schedule

        config = self.quantization_config
        rules = {"include": config.include, "exclude": config.exclude, "overrides": config.overrides}
        if config.method == "magnitude":
            fold(sparsify(model, config.pattern, **rules))
            return
        take_schedule(model, model.config.get("noise_schedule"), self._folder)
        try:
            for _ in calibrate(model, None, config.pattern, config.method, n=config.n, seed=config.seed, **rules):
                pass
        except ValueError as error:
            name = type(model).__name__
            remedy = f"load it dense and call {NAME}.calibrate(model, lambda: pipeline(prompts)), or take method='magnitude'"
            raise ValueError(f"{name} cannot be calibrated while it is loaded ({error}); {remedy}") from error

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a packed file and its metadata, checksums included. Raises ValueError without `safe_serialization`."""
        if not safe_serialization:
            raise ValueError(f"packed weights are saved as safetensors; leave safe_serialization, or call {NAME}.unpack first")
        packed, metadata = tensors.packed_state(state_dict, tensors.worth_packing(state_dict))
        return packed, metadata | {tensorfiles.CHECKSUMS: tensorfiles.checksums(packed)}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return model


def _hold(module: nn.Module, pattern: NMPattern, shape: Sequence[int]) -> None:
    """Give `module` empty `values` and `positions` in the place of its weight."""
    weight = module.weight
    if list(weight.shape) != list(shape):
        raise ValueError(f"its weight has shape {list(shape)} in the file, {list(weight.shape)} in the model")
    values, positions = tensors.packed_sizes(tuple(shape), pattern)
    module.weight = None  # keeps its place before the bias
    module.register_parameter("values", nn.Parameter(weight.new_empty(values)))
    module.register_buffer("positions", weight.new_empty(positions, dtype=torch.uint8))


def _release(module: nn.Module, pattern: str, shape: Sequence[int]) -> None:
    """Give `module` its weight, made of the `values` and `positions` that have been read."""
    values, positions = module.values.detach(), module.positions
    if values.is_meta or positions.is_meta:
        raise ValueError("its values or positions are missing")
    del module.values, module.positions
    module.weight = nn.Parameter(tensors.unpack(values, positions, pattern, tuple(shape)))


auto.AUTO_QUANTIZER_MAPPING[NAME] = NMQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = NMConfig
