"""``--kernels triton``: Linear and Conv2d layers whose forward pass reads packed mask bits beside the weights.

A swapped model holds the same parameters under the same names, and its state dict is the original's: the bits are
buffers that are not saved, written in place when a round's masks are. Layers that the kernels do not cover (groups,
dilation, circular padding, subclasses with a forward of their own) stay as they are, and are right as they are, since
weights are kept masked where they change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_conv import masked_conv2d
from fastlth_kernels.masked_linear import masked_linear
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """The layer ``linear``, by ``masked_linear``. Keeps every weight until ``keep`` says otherwise."""

    bits: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.register_buffer("bits", pack(torch.ones_like(self.weight, dtype=torch.bool)), persistent=False)

    def keep(self, mask: Tensor) -> None:
        """Take over a mask of the weight's shape, in place."""
        self.bits.copy_(pack(mask))

    def forward(self, x: Tensor) -> Tensor:
        x = _as_autocast(x)
        bias = None if self.bias is None else self.bias[None]
        y: Tensor = masked_linear(x.reshape(1, -1, self.in_features), self.weight[None], self.bits[None], bias)
        return y.view(*x.shape[:-1], self.out_features)


class MaskedConv2d(nn.Conv2d):
    """The layer ``conv``, by ``masked_conv2d``, its gradients summed in one order. Keeps every weight until ``keep``
    says otherwise."""

    bits: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size,  # type: ignore[arg-type]
            conv.stride, conv.padding, bias=conv.bias is not None, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)
        whole = torch.ones_like(self.weight, dtype=torch.bool)
        self.register_buffer("bits", pack(whole.permute(0, 2, 3, 1)), persistent=False)

    def keep(self, mask: Tensor) -> None:
        """Take over a mask of the weight's shape, in place."""
        self.bits.copy_(pack(mask.permute(0, 2, 3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = int(self.stride[0]), int(self.padding[0])
        y: Tensor = masked_conv2d(_as_autocast(x), self.weight, self.bits, self.bias, stride, padding)
        return y


def swap_(model: nn.Module) -> nn.Module:
    """Put masked layers in the place of the Linear and Conv2d layers of ``model``, which keep their parameters.

    Returns the model, or the masked layer if ``model`` itself is one of them. A layer that stands in several places
    is one layer afterwards, too.
    """
    swapped: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and (kind := _kind(child)) is not None:
                if id(child) not in swapped:
                    swapped[id(child)] = kind(child)  # type: ignore[arg-type]
                setattr(module, name, swapped[id(child)])
    own = _kind(model)
    return model if own is None else own(model)  # type: ignore[arg-type]


def write_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Copy masks, by the name of their weight, into the bits of a swapped model, in place."""
    layers = [m for m in model.modules() if isinstance(m, MaskedLinear | MaskedConv2d)]
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        for layer in layers:
            if layer.weight is parameters[name]:
                layer.keep(mask.to(layer.bits.device))


def _kind(module: nn.Module) -> type[MaskedLinear] | type[MaskedConv2d] | None:
    if type(module) is nn.Linear:
        return MaskedLinear
    if type(module) is not nn.Conv2d or isinstance(module.padding, str):
        return None
    same = len(set(module.stride)) == 1 and len(set(module.padding)) == 1
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return MaskedConv2d if same and plain else None


def _as_autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a product. Weights stay as they are: they are rounded in registers."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
