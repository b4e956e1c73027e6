"""Which page holds which tokens, by slot: one table on the host and the same one on the device.

The host's serves the cache slots of rows, the device's the page tables that attention kernels
read. Only entries that changed are sent, and the rows that a step needs are gathered on the device,
as far as its longest request goes: what crosses the bus does not grow with the context. Both happen
outside of CUDA graphs, on the stream that replays them.

Shape legend: N slots, P pages of a request, U changed entries, R rows of some attention kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .staging import Field, Staging

UPDATES_AT_ONCE = 4096
"""Most entries of one copy. A step changes a tenth of that, unless long prompts come back from host
memory."""


class PageTables:
    """Of one rank; page 0 where nothing has been set."""

    def __init__(
        self, num_slots: int, max_pages: int, device: torch.device, *, is_shared: bool
    ) -> None:
        """Make both tables.

        Args:
            num_slots: N.
            max_pages: P.
            device: where the kernels run.
            is_shared: both tables are one, as they can be on a CPU.
        """
        self.host_NP: NDArray[np.int32] = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.device_NP: Tensor = (
            torch.from_numpy(self.host_NP)  # pyright: ignore[reportUnknownMemberType]
            if is_shared
            else torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        )
        self._is_shared = is_shared
        self._staging: Staging | None = None

    def update(self, updates_U3: NDArray[np.int32]) -> None:
        """Set entries: slot, place in its table, page; of two for one place the later counts."""
        slots_U, places_U = updates_U3[:, 0], updates_U3[:, 1]
        self.host_NP[slots_U, places_U] = updates_U3[:, 2]
        if self._is_shared or not len(updates_U3):
            return
        if self._staging is None:
            fields: dict[str, Field] = {
                "places": ("i8", (UPDATES_AT_ONCE,)),
                "pages": ("i4", (UPDATES_AT_ONCE,)),
            }
            self._staging = Staging(fields, self.device_NP.device)
        tensors = self._staging.tensors
        flat_U = slots_U.astype(np.int64) * self.host_NP.shape[1] + places_U
        for begin in range(0, len(flat_U), UPDATES_AT_ONCE):
            part_U = flat_U[begin : begin + UPDATES_AT_ONCE]
            count = len(part_U)
            arrays = self._staging.next_arrays()
            arrays["places"][:count] = part_U
            # As they are in the end: of two writes to one place either may be the last.
            arrays["pages"][:count] = self.host_NP.reshape(-1)[part_U]
            self._staging.upload()
            self.device_NP.view(-1).index_copy_(
                0, tensors["places"][:count], tensors["pages"][:count]
            )

    def gather(self, slots_R: Tensor, width: int, out_RP: Tensor) -> None:
        """Put the first `width` pages of some slots into the rows of a kernel's table.

        Args:
            slots_R: int32, on the device.
            width: pages of the longest of them; at least 1.
            out_RP: [R, P] int32, in place; what is beyond `width` stays.
        """
        torch.index_select(self.device_NP[:, :width], 0, slots_R, out=out_RP[:, :width])
