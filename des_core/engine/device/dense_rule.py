"""The rule of the dense weights on a device: all of them in one launch, which a flag on the device may forbid.

Weights and state are the tensors of ``DenseRule``, found by a table of their addresses, and so are checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from des_core.engine.device import row_kernels
from des_core.engine.device.support import kernel_type
from des_core.engine.weights.optimizer import DenseRule

TILE = 1024
RULES = {"sgd": row_kernels.SGD, "adagrad": row_kernels.ADAGRAD, "adam": row_kernels.ADAM, "adamw": row_kernels.ADAM}
SLOTS = {"sgd": (), "adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}


class DeviceDenseRule(DenseRule):
    """torch's rule for the dense weights, as a kernel."""

    _moved: tuple[int, ...] = ()
    _tiles_T5: Tensor | None = None

    def zero_gradients(self) -> None:
        """Drop the gradients, so that backward need not add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def numbers(self, rate: float) -> tuple[float, ...]:
        """The numbers that the kernel takes at the next step, which is counted here."""
        config = self.config
        for slots in self.state.values():
            slots["step"] += 1
        if config.name in ("sgd", "adagrad"):
            return rate, config.l2, config.eps
        step = max((int(slots["step"]) for slots in self.state.values()), default=1)
        decay = 1 - rate * config.weight_decay if config.name == "adamw" else 1.0
        first, second = 1 - config.beta1**step, (1 - config.beta2**step) ** 0.5
        return rate / first, config.l2, config.eps, decay, 1 - config.beta1, config.beta2, 1 - config.beta2, second

    def restore(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Take over a checkpoint's ``state``."""
        super().restore(state)
        self._tiles_T5 = None

    @torch.no_grad()
    def update(self, moved: tuple[int, ...], gradients: Tensor, control: Tensor, finite: Tensor) -> None:
        """Update the weights of these numbers by their gradients, flat and one after the other."""
        if self._tiles_T5 is None or moved != self._moved:
            self._moved, self._tiles_T5 = moved, self._tiles(moved)
        tiles_T5 = self._tiles_T5
        row_kernels.update_dense[(len(tiles_T5),)](
            tiles_T5, gradients, finite, control, RULE=RULES[self.config.name], DTYPE=kernel_type(gradients.dtype),
            BLOCK=TILE,
        )  # fmt: skip

    def _tiles(self, moved: tuple[int, ...]) -> Tensor:
        names = SLOTS[self.config.name]
        if names:
            new = [number for number in moved if number not in self.state]
            self._slots({number: self.parameters[number] for number in moved}, "step", *names)
            for number in new:
                # ``numbers`` of its first step did not know it.
                self.state[number]["step"] += 1
        tiles, begin = [], 0
        for number in moved:
            weight = self.parameters[number]
            held = [weight.detach(), *(self.state[number][name] for name in names)]
            assert all(tensor.is_contiguous() for tensor in held)
            size = weight.element_size()
            for at in range(0, weight.numel(), TILE):
                places = [tensor.data_ptr() + at * size for tensor in held]
                places += [places[0]] * (3 - len(places))
                tiles.append([*places, begin + at, min(TILE, weight.numel() - at)])
            begin += weight.numel()
        return torch.tensor(tiles, dtype=torch.int64).to(self.parameters[0].device)
