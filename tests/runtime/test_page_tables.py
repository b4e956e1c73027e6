"""Page tables: the device's copy follows the host's by the entries that changed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_tune.runtime import page_tables
from nanoflow_tune.runtime.page_tables import PageTables

SLOTS, PAGES = 5, 7
CPU = torch.device("cpu")
entries = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, PAGES - 1), st.integers(1, 99))


def as_updates(wanted):
    return np.array(wanted, dtype=np.int32).reshape(-1, 3)


@given(st.lists(st.lists(entries, max_size=25), max_size=6), st.booleans())
@settings(max_examples=100, deadline=None)
def test_both_tables_hold_what_was_set_last(steps, is_shared):
    expected = np.zeros((SLOTS, PAGES), dtype=np.int32)
    tables = PageTables(SLOTS, PAGES, CPU, is_shared=is_shared)
    before = tables.device_NP.data_ptr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_tables, "UPDATES_AT_ONCE", 8)  # several copies a step
        for wanted in steps:
            for slot, place, page in wanted:
                expected[slot, place] = page
            tables.update(as_updates(wanted))
            assert tables.host_NP.tolist() == tables.device_NP.tolist() == expected.tolist()
    assert tables.device_NP.data_ptr() == before  # gathered from by steps that are queued


@given(st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=6), st.integers(1, PAGES))
@settings(max_examples=50, deadline=None)
def test_a_kernel_gets_the_first_pages_of_its_rows(slots, width):
    tables = PageTables(SLOTS, PAGES, CPU, is_shared=False)
    full = np.arange(SLOTS * PAGES, dtype=np.int32).reshape(SLOTS, PAGES) + 1
    places = np.indices((SLOTS, PAGES)).reshape(2, -1)
    tables.update(np.stack((*places, full.reshape(-1)), axis=1).astype(np.int32))
    out_RP = torch.zeros((len(slots) + 1, PAGES), dtype=torch.int32)
    place = out_RP.data_ptr()
    tables.gather(torch.tensor(slots, dtype=torch.int32), width, out_RP[: len(slots)])
    assert out_RP.data_ptr() == place
    assert out_RP[: len(slots), :width].tolist() == full[slots, :width].tolist()
    assert not out_RP[: len(slots), width:].any()
    assert not out_RP[len(slots) :].any()
