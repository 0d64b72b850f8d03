"""The families of denoisers: how each is called, which of its layers stay dense by default, how its channels hang together.

`FAMILIES` has one entry a class, which holds for its subclasses, too; docs/models.md says how to add one.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..masking import dense

Inputs = dict[str, Any]  # keyword arguments of a call: tensors, and dicts of tensors (added_cond_kwargs)
Zeros = Callable[..., torch.Tensor]  # zeros(*shape): [B, *shape] in the dtype and on the device of the model

# Tokens of text that each class gets from its pipeline by default.
CLIP_TOKENS, PIXART_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 120, 333, 512
FLUX_SIDE = 128  # of the latents in FluxPipeline (pictures of 1024x1024), which its config does not tell


@dataclass(frozen=True)
class Pair:
    """Two layers of a block whose channels structured pruning (Diff-Pruning) removes together.

    Attributes:
        writer: name, in the block, of the layer whose outputs these channels are.
        reader: name, in the block, of the layer whose inputs these channels are.
        heads: name of the module whose `num_heads` says in how many equal parts the channels stay or go; None for one by one.
    """

    writer: str
    reader: str
    heads: str | None = None


class Denoiser:
    """A family of denoisers; this base class calls `model(sample, timestep)`, with `class_labels` if the model has classes.

    Attributes:
        picture: name of the argument that takes the noisy picture.
        flow: whether the model predicts noise - picture (rectified flow).
        dense: globs of the layers that stay dense by default; None for the general rule (`masking.dense`).
        pairs: the pairs of layers in the blocks, for Diff-Pruning; None: torch-pruning traces the channels, back from `conv_out`.
    """

    picture: str = "sample"
    flow: bool = False
    dense: tuple[str, ...] | None = None
    pairs: tuple[Pair, ...] | None = None

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        """The shape of one picture. Raises ValueError if the config does not tell the shape."""
        channels, size = _picture_config(model)
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    def null_label(self, model: nn.Module) -> int | None:
        """As the function `null_label`."""
        config = getattr(model, "config", None)  # a module of your own may have none
        classes = getattr(config, "num_classes", None) or getattr(config, "num_class_embeds", None)
        return None if classes is None else classes - 1

    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        """The further arguments that the data must bring. Raises ValueError if the config does not tell their shapes."""
        return {} if self.null_label(model) is None else {"class_labels": zeros().long()}

    def inputs(self, model: nn.Module, zeros: Zeros) -> Inputs:
        """All arguments of a call."""
        return {self.picture: zeros(*self.shape(model)), "timestep": zeros().long(), **self.conditioning(model, zeros)}

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, conditioning: Inputs) -> torch.Tensor:
        """What `model` (or a wrapper around it) predicts for pictures x [B, C, H, W] at t, a number or [B].

        [B, C, H, W]; models that also predict a variance give [B, 2 C, H, W].
        """
        return _tensor(model(x, t, **conditioning))


class _UViT(Denoiser):
    """With class labels or with text."""

    dense = ("patch_embed.*", "context_embed", "decoder_pred", "final_layer")  # SparseDM 4: block linears and skip_linear
    pairs = (Pair("attn.qkv", "attn.proj", heads="attn"), Pair("mlp.fc1", "mlp.fc2"))

    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        tokens, dim = model.config.context_tokens, model.config.context_dim
        text = {"encoder_hidden_states": zeros(tokens, dim)} if dim else {}
        return super().conditioning(model, zeros) | text


class _UNet(Denoiser):
    dense = ("conv_in", "conv_out")


class _TextUNet(_UNet):
    """UNet2DConditionModel as in Stable Diffusion 1 and 2 (text) and SDXL (text, its pooled form, sizes)."""

    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        config, dim = model.config, model.config.cross_attention_dim
        tokens = getattr(config, "context_tokens", CLIP_TOKENS)  # of our own; the class itself takes any number
        kinds = {key: getattr(config, key, None) for key in ("encoder_hid_dim_type", "class_embed_type", "addition_embed_type")}
        other = [f"{key} {kind!r}" for key, kind in kinds.items() if kind and (key, kind) != ("addition_embed_type", "text_time")]
        if other:
            raise ValueError(f"{type(model).__name__} with {', '.join(other)} is not known here; pass inputs={{...}}")
        text = {"encoder_hidden_states": zeros(tokens, dim if isinstance(dim, int) else dim[0])}
        if kinds["addition_embed_type"]:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
        return text | super().conditioning(model, zeros)


class _VideoUNet(_TextUNet):
    def shape(self, model: nn.Module) -> tuple[int, ...]:
        raise ValueError(f"the config of {type(model).__name__} does not tell the number of frames; pass inputs={{...}}")


class _AudioUNet(Denoiser):
    def shape(self, model: nn.Module) -> tuple[int, ...]:
        return _picture_config(model)


class _Transformer(Denoiser):
    """Transformers call the picture `hidden_states`, each class orders its other arguments in its own way, and t is [B]."""

    picture = "hidden_states"

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, conditioning: Inputs) -> torch.Tensor:
        return _tensor(model(x, timestep=t.expand(len(x)), **conditioning))


class _DiT(_Transformer):
    def null_label(self, model: nn.Module) -> int | None:
        return model.config.num_embeds_ada_norm  # the label table has one row more


class _PixArt(_Transformer):
    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        dim = model.config.caption_channels or model.config.cross_attention_dim
        arguments = {"encoder_hidden_states": zeros(PIXART_TOKENS, dim)}
        if model.use_additional_conditions:
            arguments["added_cond_kwargs"] = {"resolution": zeros(2), "aspect_ratio": zeros(1)}
        return arguments


class _SD3(_Transformer):
    flow = True
    tokens = SD3_TOKENS

    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        text = zeros(self.tokens, model.config.joint_attention_dim)
        return {"encoder_hidden_states": text, "pooled_projections": zeros(model.config.pooled_projection_dim)}


class _Flux(_SD3):
    """FluxTransformer2DModel takes 2x2 patches of the latents as tokens, the positions of these tokens, and t in 0..1."""

    tokens = FLUX_TOKENS

    def shape(self, model: nn.Module) -> tuple[int, ...]:
        return (model.config.in_channels // 4, FLUX_SIDE, FLUX_SIDE)

    def conditioning(self, model: nn.Module, zeros: Zeros) -> Inputs:
        guidance = {"guidance": zeros()} if model.config.guidance_embeds else {}
        return super().conditioning(model, zeros) | guidance

    def inputs(self, model: nn.Module, zeros: Zeros) -> Inputs:
        arguments = super().inputs(model, zeros)
        latents = arguments["hidden_states"]
        positions = self._positions(latents, arguments["encoder_hidden_states"])
        return arguments | {"hidden_states": self._patches(latents), "timestep": zeros()} | positions

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, conditioning: Inputs) -> torch.Tensor:
        positions = self._positions(x, conditioning["encoder_hidden_states"])
        y = super().predict(model, self._patches(x), t / 1000, conditioning | positions)  # [B, (H/2)(W/2), 4 C]
        y = y.unflatten(1, (x.shape[-2] // 2, x.shape[-1] // 2))  # [B, H/2, W/2, 4 C]
        y = y.unflatten(-1, (-1, 2, 2))  # [B, H/2, W/2, C, 2, 2]
        y = y.permute(0, 3, 1, 4, 2, 5)  # [B, C, H/2, 2, W/2, 2]
        return y.flatten(4).flatten(2, 3)  # [B, C, H, W]

    @staticmethod
    def _patches(x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to tokens [B, (H/2)(W/2), 4 C], channel slowest."""
        x = x.unflatten(-1, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H/2, 2, W/2, 2]
        x = x.permute(0, 2, 4, 1, 3, 5)  # [B, H/2, W/2, C, 2, 2]
        return x.flatten(3).flatten(1, 2)  # [B, (H/2)(W/2), 4 C]

    @staticmethod
    def _positions(x: torch.Tensor, text: torch.Tensor) -> Inputs:
        """Where each patch of x [B, C, H, W] and each token of text [B, tokens, dim] stands; text has no place."""
        rows, columns = (torch.arange(size // 2).to(x) for size in x.shape[-2:])
        grid = torch.cartesian_prod(torch.zeros(1).to(x), rows, columns)  # [(H/2)(W/2), 3]: 0, row, column
        return {"img_ids": grid, "txt_ids": x.new_zeros(text.shape[1], 3)}


FAMILIES = {
    "UViTModel": _UViT(),
    "UNet1DModel": _AudioUNet(),
    "UNet2DModel": _UNet(),
    "UNet2DConditionModel": _TextUNet(),
    "UNet3DConditionModel": _VideoUNet(),
    "DiTTransformer2DModel": _DiT(),
    "PixArtTransformer2DModel": _PixArt(),
    "SD3Transformer2DModel": _SD3(),
    "FluxTransformer2DModel": _Flux(),
}
for _name, _family in FAMILIES.items():
    if _family.dense is not None:
        dense.register(_name, _family.dense)


def of(model: nn.Module) -> Denoiser:
    """The family of `model`, by its class or the nearest parent class that has one; compiled or not. Else `Denoiser`."""
    classes = type(_plain(model)).__mro__
    return next((FAMILIES[cls.__name__] for cls in classes if cls.__name__ in FAMILIES), Denoiser())


def _plain(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile


def refuse_unknown(model: nn.Module, remedy: str) -> None:
    """Raise ValueError, with `remedy`, for a class of diffusers without a family, or a class of your own that takes no (x, t).

    The arguments and predictions of diffusers' classes follow no rule. A class of your own is called as its family, or as
    `Denoiser`.
    """
    model = _plain(model)
    parents = [cls for cls in type(model).__mro__ if _of_diffusers(cls)]
    unknown = _of_diffusers(type(model).forward) and parents[0].__name__ not in FAMILIES
    if unknown or not _takes_two(model.forward):
        known = ", ".join(FAMILIES)
        raise ValueError(f"{type(model).__name__} is none of the classes that this package can call ({known}); {remedy}")


def _of_diffusers(thing: type | Callable) -> bool:
    return thing.__module__.startswith("diffusers.")


def _takes_two(function: Callable) -> bool:
    try:
        inspect.signature(function).bind_partial(None, None)
    except TypeError:
        return False
    return True


def example_inputs(model: nn.Module, batch: int = 1) -> Inputs:
    """The keyword arguments of one call of `model` for `batch` pictures: zeros in its dtype and on its device.

    Raises:
        ValueError: a class that is not known, or a config that does not tell the shapes.
    """
    refuse_unknown(model, "pass inputs={...}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return of(model).inputs(model, lambda *shape: like.new_zeros(batch, *shape))


def require(model: nn.Module, given: Collection[str], remedy: str) -> None:
    """Raise ValueError, with `remedy`, unless the names in `given` include every argument that conditions `model`."""
    try:
        needed = of(model).conditioning(model, lambda *shape: torch.empty(shape, device="meta"))
    except ValueError:
        return  # an unknown layout: the caller knows better
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{type(model).__name__} needs {', '.join(missing)}; {remedy}")


def null_label(model: nn.Module) -> int | None:
    """The label that means "no class" (the last row of the label table), or None for a model without labels."""
    return of(model).null_label(model)


def picture_size(model: nn.Module) -> int | None:
    """Height and width of the model's pictures, or None if the pictures are not square or the config does not tell."""
    size = getattr(getattr(model, "config", None), "sample_size", None)
    return size if isinstance(size, int) else None


def predicts_variance(model: nn.Module) -> bool:
    """Whether `model` predicts a variance beside the noise: twice as many channels as the picture has."""
    config = getattr(model, "config", None)
    return getattr(config, "out_channels", None) == 2 * getattr(config, "in_channels", 0)


def each(function: Callable[[torch.Tensor], Any], inputs: Any) -> Any:
    """`inputs` with `function` applied to every tensor, also to the tensors in nested dicts, lists and tuples."""
    if isinstance(inputs, Mapping):
        return {name: each(function, value) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        values = [each(function, value) for value in inputs]
        return values if isinstance(inputs, list) else tuple(values)
    return function(inputs) if isinstance(inputs, torch.Tensor) else inputs


def _picture_config(model: nn.Module) -> tuple[int, int | tuple[int, int]]:
    config = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        name, remedy = type(model).__name__, "give it both, or pass inputs={...}"
        raise ValueError(f"{name} has no config.sample_size and in_channels; {remedy}")
    return channels, size


def _tensor(output: Any) -> torch.Tensor:
    """The prediction in what a model returns: an output object, a tuple or a tensor."""
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output
