"""What a network of ours can do besides computing: be packed, saved with its code, loaded with care, and uploaded."""

from collections import defaultdict

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .engine_binaryvit import EngineSlot
from .packed_files_binaryvit import check_packed_files, packed_state_dict
from .packing_binaryvit import PackedLinear, binary_layers, expect_packed_layers, pack_layers, unpack_layers
from .quantization_binaryvit import QUANT_METHOD
from .shipping_binaryvit import ShippedModel


# What AutoConfig and AutoModel… of a machine without this package load from a saved folder. The config alone would get the
# saved class's entry only.
AUTO_MAP = {
    "AutoConfig": "configuration_binaryvit.BinaryViTConfig",
    "AutoModel": "modeling_binaryvit.BinaryViTModel",
    "AutoModelForImageClassification": "modeling_binaryvit.BinaryViTForImageClassification",
}
ALIGNMENT = 64  # bytes, of PyTorch's own allocator on the CPU


class PackableModel(PreTrainedModel):
    """Base of the models. `BinaryViTQuantizer` calls the last five methods."""

    def __init__(self, config, *args, **kwargs):
        check_quantization_config(getattr(config, "quantization_config", None))
        super().__init__(config, *args, **kwargs)
        self.engine_slot = EngineSlot()

    @classmethod
    @torch.inference_mode(False)  # or PyTorch would not count the changes of what is loaded
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As in transformers, but never random weights in the place of packed ones.

        Raises:
            ValueError: packed weights that are damaged, incomplete or of another config; the message names the tensor.
        """
        try:
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {str(pretrained_model_name_or_path)!r} are damaged: {error}") from error
        check_loading(model, loading_info)
        if model.is_packed:
            # A gradient is nothing to expect of bits; what asks for one has PyTorch compute it.
            model.base_model.requires_grad_(False)
            lay_in_one_buffer(model.base_model)
        align_weights(model)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        As in transformers, but binary weights are uploaded as bits: the packed model is the repository's, and the latent
        weights lie in its folder `latent`. What is packed already is uploaded as it is.
        """
        if self.is_packed or self.config.weight_bits == 32:
            return super().push_to_hub(repo_id, **kwargs)
        return ShippedModel(self).push_to_hub(repo_id, **kwargs)

    def train(self, mode: bool = True):
        """
        Raises:
            ValueError: training mode for packed weights.
        """
        if mode and self.is_packed:
            raise ValueError(
                "Packed weights cannot be trained: a bit has no gradient, and the float weights whose signs they are were "
                "not kept. Train the latent checkpoint that they were packed from, or a copy with .dequantize()."
            )
        return super().train(mode)

    def refresh_engine(self) -> None:
        """
        Have the engine read the model anew at the next call. Needed only after changes that PyTorch does not count: through
        `.data` or `.numpy()` in place (`weight.data.add_(1)`), and to plain attributes of modules (`norm.eps = 1e-3`).
        """
        self.base_model.engine_slot.folded = None

    @property
    def is_packed(self) -> bool:
        return any(isinstance(module, PackedLinear) for module in self.modules())

    def expect_latent_weights(self) -> None:
        """
        Raises:
            ValueError: there is nothing to pack.
        """
        if self.config.weight_bits == 32:
            raise ValueError("There is nothing to pack: weight_bits of the config is 32.")
        # A sign is decided in float32, whatever dtype the rest is loaded in.
        self._keep_in_fp32_modules_strict = {f"{name}.weight" for name in binary_layers(self)}

    def expect_packed_weights(self, checkpoint_files: list[str] | None) -> None:
        """
        Raises:
            ValueError: the files are damaged or do not fit the config.
        """
        expect_packed_layers(self)
        if checkpoint_files is not None:
            check_packed_files(checkpoint_files, self)

    def pack_weights(self) -> None:
        pack_layers(self)

    def packed_state_dict(self, half: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return packed_state_dict(self, half)

    def unpack_weights(self) -> None:
        unpack_layers(self)
        self.requires_grad_(True)


def check_quantization_config(quantization_config) -> None:
    """
    Raises:
        ValueError: for a network of new weights, or for a method that would leave packed weights aside.
    """
    if quantization_config is None:
        return
    if isinstance(quantization_config, dict):  # from_pretrained makes an object of what it knows
        method = quantization_config.get("quant_method")
    else:
        method = quantization_config.quant_method
    if method != QUANT_METHOD:
        raise ValueError(
            f"BinaryViT's weights are packed by quant_method {QUANT_METHOD!r}; {method!r} is none of its own."
        )
    if isinstance(quantization_config, dict):
        raise ValueError(
            "This config is of packed weights, which a new network does not have: load them with from_pretrained, or "
            "remove quantization_config from the config."
        )


def check_loading(model: PackableModel, loading_info: dict) -> None:
    """
    Raises:
        ValueError: packed weights were asked for or found, and were not loaded.
    """
    random = {*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])}
    if model.is_packed and random:
        raise ValueError(f"The checkpoint lacks the tensor {min(random)!r}, so it makes no packed model.")
    packed = [key for key in loading_info["unexpected_keys"] if key.endswith(".packed_weight")]
    if packed:
        raise ValueError(
            f"Tensor {min(packed)!r} is packed, but config.json has no quantization_config that says so: they do not "
            "belong together."
        )


def lay_in_one_buffer(model: nn.Module) -> None:
    """
    Make all tensors of a dtype views of one buffer. PyTorch counts the changes of a buffer and of its views together, so the
    engine looks at one counter a dtype; thousands of them, all over the memory, would take a tenth of a forward.
    """
    by_dtype = defaultdict(list)
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and tensor.device.type == "cpu":
                    by_dtype[tensor.dtype].append((members, name, tensor))
    for dtype, places in by_dtype.items():
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-tensor.numel() // step) * step for *_, tensor in places]
        buffer = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        for (members, name, tensor), part in zip(places, buffer.split(sizes)):
            view = part[: tensor.numel()].view(tensor.shape).copy_(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            members[name] = nn.Parameter(view, tensor.requires_grad) if is_parameter else view


def align_weights(model: nn.Module) -> None:
    """
    Copy to aligned memory what still lies in the file, where its address depends on the file's header: a matrix product
    may round differently by the alignment of its operands, and packed and latent models would differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
