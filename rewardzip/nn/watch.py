"""Whether the numbers of some layers are still what they were, asked at every call.

The questions are written out as source, see ``rewardzip_kernels.written``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from ctypes import addressof, c_int32
from typing import Any

from torch import Tensor, nn

from rewardzip_kernels import written

Table = Mapping[str, Tensor | None]

# of a parameter's memory, spread so that they share no row and no column
SAMPLES, GOLDEN = 16, 0.6180339887498949


def samples(parameter: Tensor) -> list[c_int32]:
    """Some of the numbers of a parameter on a CPU, where they lie: writes through its ``data`` are not counted."""
    # one whose memory was given up for a while, as sharding does, lies nowhere
    if not parameter.is_cpu or parameter.numel() == 0 or parameter.data_ptr() == 0:
        return []
    steps = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    count = (steps + 1) * parameter.element_size() // 4
    places = [int((i + 1) * GOLDEN % 1 * count) for i in range(min(SAMPLES, count))]
    return [c_int32.from_address(parameter.data_ptr() + 4 * place) for place in places]


class Watch:
    """The tensors in these tables, modules' ``_buffers`` or ``_parameters``, as they are now.

    Replaced, if only for a call (``torch.func.functional_call``), written to, or parameters given other ``data``: it
    sees all but what was written to tensors made in inference mode, which count no changes. What was written to a
    parameter through its ``data`` or by another process shows on a CPU where one of its ``samples`` is another.
    """

    def __init__(self, tables: Iterable[Table]) -> None:
        self.names: dict[str, Any] = {}
        self.entries: list[tuple[Table, str, Tensor | None]] = []
        self.replaced: list[str] = []
        self.moved: dict[str, str] = {}
        self.versions: dict[str, int] = {}
        self.samples: list[c_int32] = []
        for i, table in enumerate(tables):
            self.names[f"t{i}"] = table
            for j, (key, tensor) in enumerate(table.items()):
                name = f"t{i}_{j}"
                self.names[name] = tensor
                self.entries.append((table, key, tensor))
                self.replaced.append(f"t{i}.get({key!r}) is not {name}")
                if isinstance(tensor, nn.Parameter):
                    self.names[f"{name}_at"] = tensor.data_ptr()
                    # held, or other data might come to lie where these lay
                    self.names[f"{name}_memory"] = tensor.detach()
                    self.moved[name] = f"{name}.data_ptr() != {name}_at"
                    self.samples += samples(tensor)
                if tensor is not None and not tensor.is_inference():
                    self.versions[name] = tensor._version
        self.sampled = [sample.value for sample in self.samples]
        self.names |= {"samples": self.samples, "sampled": self.sampled}

    def changed(self, live: Set[int] = frozenset()) -> str:
        """An expression over ``names``; what is written to the tensors of these ids is no change."""
        counted = self._counted(live)
        # numbers go by names: the source stays the same when they change, and is compiled once
        total = f"versions_of_{len(counted)}"
        self.names[total] = sum(self.versions[name] for name in counted)
        written = [f"{' + '.join(f'{name}._version' for name in counted)} != {total}"] if counted else []
        other = ["[sample.value for sample in samples] != sampled"] if self.samples else []
        return " or ".join([*self.replaced, *self.moved.values(), *written, *other])

    def changed_by(self, ask: Callable[..., Callable[[], bool] | None] | None, live: Set[int]) -> str:
        """``changed``, asked by the function that ``ask`` makes where it makes one."""
        if ask is not None:
            counted = self._counted(live)
            version = sum(self.versions[name] for name in counted)
            moved = [(self.names[name], self.names[f"{name}_at"]) for name in self.moved]
            sampled = list(zip(map(addressof, self.samples), self.sampled, strict=True))
            self.names["changed"] = ask(self.entries, [self.names[name] for name in counted], version, moved, sampled)
            if self.names["changed"] is not None:
                return "changed()"
        return self.changed(live)

    def _counted(self, live: Set[int]) -> list[str]:
        return [name for name in self.versions if id(self.names[name]) not in live]

    def is_other(self, ask: Callable[..., Callable[[], bool] | None] | None = None) -> Callable[[], bool]:
        return self.function(f"def f(): return {self.changed_by(ask, frozenset())}")

    def function(self, source: str, **names: Any) -> Callable[..., Any]:
        """The function ``f`` that the source defines."""
        return written.function(source, self.names | names)
