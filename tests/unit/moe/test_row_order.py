"""The order of rows by expert, against plain sorting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_moe.moe.row_order import move, number_rows, place_rows, sort_slots


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 4), st.data())
def test_slots_are_ordered_by_expert_and_then_by_slot(
    experts: int, tokens: int, slots: int, data: st.DataObject
) -> None:
    row = st.lists(st.integers(-1, experts - 1), min_size=slots, max_size=slots)
    ids = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(tokens, slots)
    flat = ids_TK.reshape(-1).tolist()
    wanted = sorted((slot for slot, expert in enumerate(flat) if expert >= 0), key=lambda slot: flat[slot])
    for remove_empty in (True, False):
        rows, ends_E, counts_E = sort_slots(ids_TK, experts, number_rows, remove_empty=remove_empty)
        assert counts_E.tolist() == [flat.count(expert) for expert in range(experts)]
        assert ends_E.tolist() == counts_E.cumsum(0).tolist()
        assert rows.slot_R[: len(wanted)].tolist() == wanted
        assert len(rows.slot_R) == (len(wanted) if remove_empty else len(flat))
        assert rows.token_R.tolist() == [slot // slots for slot in rows.slot_R.tolist()]
        row_of = {slot: row for row, slot in enumerate(wanted)}
        assert rows.row_TK.reshape(-1).tolist() == [row_of.get(slot, -1) for slot in range(len(flat))]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 4]), st.data())
def test_trap_T27_rows_are_placed_by_expert_and_then_by_sender(
    senders: int, local: int, tile: int, data: st.DataObject
) -> None:
    table = st.lists(st.integers(0, 6), min_size=local, max_size=local)
    counts_Pe = torch.tensor(data.draw(st.lists(table, min_size=senders, max_size=senders)))
    arriving = [(p, e) for p in range(senders) for e in range(local) for _ in range(int(counts_Pe[p, e]))]
    placement = place_rows(counts_Pe, len(arriving), tile)
    padded = [-(-int(count) // tile) * tile for count in counts_Pe.sum(0)]
    assert placement.ends_e.tolist() == torch.tensor(padded).cumsum(0).tolist()
    assert placement.ends_e.dtype == torch.int32
    in_place: list[tuple[int, int] | None] = [None] * sum(padded)
    for row, place in enumerate(placement.place_R.tolist()):
        assert placement.source_Q[place] == row
        in_place[place] = arriving[row]
    first = 0
    for expert, size in enumerate(padded):
        rows = [(p, e) for p, e in arriving if e == expert]
        assert in_place[first : first + size] == rows + [None] * (size - len(rows)), "the sort is stable"
        first += size
    padding = [place for place, row in enumerate(in_place) if row is None]
    assert (placement.padding.tolist() if placement.padding is not None else []) == padding
    ends = placement.ends_e.tolist()
    for place in padding:
        expert = next(expert for expert, end in enumerate(ends) if place < end)
        assert arriving[placement.source_Q[place]][1] == expert, "padding repeats a row of its own expert"


@pytest.mark.parametrize("tile", [1, 4])
def test_a_move_keeps_rows_and_slots_together(tile: int) -> None:
    ids_TK = torch.tensor([[1, 0], [-1, 1], [2, -1]])
    before, _, counts_E = sort_slots(ids_TK, 3, number_rows, remove_empty=True)
    after = move(before, place_rows(counts_E.unsqueeze(0), len(before.slot_R), tile))
    for slot, row in enumerate(after.row_TK.reshape(-1).tolist()):
        if ids_TK.reshape(-1)[slot] < 0:
            assert row == -1
        else:
            assert (after.slot_R[row], after.token_R[row]) == (slot, slot // 2)
            assert row // tile == ids_TK.reshape(-1)[slot] or tile == 1
