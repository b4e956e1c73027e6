"""SM partitions on a real GPU: exactly the SMs asked for, disjoint, eagerly and in CUDA graphs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def partitions():
    from nanoflow_tune.runtime.sm_partition import SmPartitions

    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return SmPartitions(sms, 8)


def complement_slots(partitions, size):
    from nanoflow_tune.runtime.partition_layout import GroupRange

    split = partitions.split
    share = size * split.granularity
    return {
        ("memory", share): GroupRange(start=0, end=size),
        ("compute", partitions.num_sms - share): GroupRange(
            start=size, end=split.num_groups, has_remainder=split.remainder > 0
        ),
    }


@pytest.mark.parametrize("size", [1, 4, 8, 14])
def test_a_share_and_its_complement_are_disjoint_and_complete(partitions, size):
    slots = complement_slots(partitions, size)
    first, second = partitions.view(slots).audit([tuple(slots)])
    assert not first.sm_ids & second.sm_ids
    assert len(first.sm_ids | second.sm_ids) == partitions.num_sms


def test_overlapping_shares_are_an_error_that_names_both(partitions):
    from nanoflow_tune.runtime.partition_layout import GroupRange
    from nanoflow_tune.runtime.sm_partition import PartitionError

    slots = {
        ("memory", 32): GroupRange(start=0, end=4),
        ("network", 16): GroupRange(start=3, end=5),
    }
    with pytest.raises(PartitionError, match=r"lane memory on 32.*lane network on 16.*share SMs"):
        partitions.view(slots).audit([tuple(slots)])


def test_a_share_other_than_asked_is_an_error(partitions):
    from nanoflow_tune.runtime.partition_layout import GroupRange
    from nanoflow_tune.runtime.sm_partition import PartitionError

    with pytest.raises(PartitionError, match="asked for 40 SMs but ran on 32"):
        partitions.view({("memory", 40): GroupRange(start=0, end=4)}).audit()


def test_a_slot_that_was_not_laid_out_is_refused(partitions):
    from nanoflow_tune.runtime.sm_partition import PartitionError

    with pytest.raises(PartitionError, match="no partition of 24 SMs on lane memory"):
        partitions.view({}).stream("memory", 24)


def test_a_spec_with_other_sms_than_the_device_is_refused():
    from nanoflow_tune.runtime.sm_partition import PartitionError, SmPartitions

    with pytest.raises(PartitionError, match="the hardware spec says 64 SMs"):
        SmPartitions(64, 8)
