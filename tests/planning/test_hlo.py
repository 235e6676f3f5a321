# ruff: noqa: E501
"""Collectives counted by hand."""

import numpy as np
import pytest

from dpo_jax.planning import hlo

# A loop of 3 trips gathers f32[8,4] over 4 devices, in a fusion that starts it,
# one that ends it, and a step in an inner loop of 5 that it overlaps, which
# all-reduces bf16[16] over pairs.
_TEXT = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%gather_start (p: f32[2,4]) -> (f32[2,4], f32[8,4]) {
  %p = f32[2,4]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[8,4]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true
}

%gather_step (p: f32[2,4]) -> f32[8,4] {
  %p = f32[2,4]{1,0:T(8,128)} parameter(0)
  ROOT %g.2 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true
}

%gather_done (p: f32[2,4]) -> f32[8,4] {
  %p = f32[2,4]{1,0:T(8,128)} parameter(0)
  ROOT %g.1 = f32[8,4]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true
}

%inner_body (t: (s32[], bf16[16])) -> (s32[], bf16[16]) {
  %t = (s32[]{:T(128)}, bf16[16]{0:T(256)}) parameter(0)
  %x = bf16[16]{0:T(256)} get-tuple-element(%t), index=1
  %r = bf16[16]{0:T(256)} all-reduce(%x), channel_id=8, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %step = f32[8,4] fusion(%x), kind=kCustom, calls=%gather_step
  ROOT %o = (s32[], bf16[16]) tuple(%i, %r)
}

%inner_condition (t: (s32[], bf16[16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %t = (s32[]{:T(128)}, bf16[16]{0:T(256)}) parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%outer_body (t: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %t = (s32[], f32[2,4]{1,0:T(8,128)}) parameter(0)
  %s = (f32[2,4], f32[8,4]) fusion(%x), kind=kCustom, calls=%gather_start
  %d = f32[8,4] fusion(%s), kind=kCustom, calls=%gather_done
  %w = (s32[], bf16[16]) while(%z), condition=%inner_condition, body=%inner_body
  ROOT %o = (s32[], f32[2,4]) tuple(%i, %x)
}

%outer_condition (t: (s32[], f32[2,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0:T(256)} parameter(0)
  %r.1 = f32[64]{0:T(256)} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[8] dynamic-slice(%r.1, %k), dynamic_slice_sizes={8}
}

ENTRY %main (p: f32[2,4]) -> f32[8] {
  %p = f32[2,4]{1,0:T(8,128)} parameter(0)
  %w.1 = (s32[], f32[2,4]) while(%p), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%q), channel_id=10, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %permute = f32[4]{0} collective-permute(%q), channel_id=11, source_target_pairs={{0,4},{4,0}}
  ROOT %alone = f32[4]{0} all-reduce(%q), channel_id=12, replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
  found = {
    (c.kind, c.trips, c.group_size): c.num_bytes
    for c in hlo.collectives(_TEXT, 8)
  }
  assert found == {
    ("all-gather", 3, 4): 8 * 4 * 4 * 3 / 4,
    ("all-reduce", 15, 2): 2 * 16 * 2 * 1 / 2,
    ("reduce-scatter", 1, 8): 64 * 4 * 7 / 8,
    ("all-gather", 1, 4): 8 * 4 * 3 / 4,
    ("collective-permute", 1, 2): 16,
  }


def test_collectives_of_one_channel_are_all_counted():
  """A shard_map's have channel 1, whichever they are."""
  line = "  %alone.N = f32[64]{0} all-reduce(%q), channel_id=1, to_apply=%add\n"
  place = "  %start = "
  text = _TEXT.replace(
    place, line.replace("N", "1") + line.replace("N", "2") + place
  )
  found = [c for c in hlo.collectives(text, 8) if c.kind == "all-reduce"]
  assert [c.num_bytes for c in found if c.trips == 1] == [
    64 * 4 * 2 * 7 / 8
  ] * 2


def test_groups_that_cross_slices_are_told_apart():
  """Devices 0 to 3 are one slice: x of the mesh crosses, y does not."""
  found = hlo.collectives(_TEXT, 8, lambda device: device // 4)
  assert {c.kind: c.crosses for c in found if c.trips > 1} == {
    "all-gather": False,
    "all-reduce": True,
  }


@pytest.mark.parametrize(
  ("spelling", "groups"),
  [
    ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh[a=2,b=2] {b}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=(1,2,3,0) {'b'}", [[1, 2], [3, 0]]),
    ("{{0,1,2,3}}", [[0, 1, 2, 3]]),
    ("{}", [[0, 1, 2, 3]]),
  ],
)
def test_every_spelling_of_groups_is_read(spelling, groups):
  line = f"%x = f32[4] all-reduce(%y), replica_groups={spelling}, to_apply=%a"
  np.testing.assert_array_equal(hlo._groups(line, 4), groups)


def test_parts_of_an_axis_are_grouped_together():
  """Pairs of 8 devices that differ in the first and the last of three bits."""
  line = "%x = f32[] all-reduce(%y), replica_groups=mesh['a'=8] {'a':(4)2,'a'"
  groups = hlo._groups(line + ":(1)2}, to_apply=%a", 8)
  assert sorted(map(sorted, groups.tolist())) == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("ENTRY", "MAIN"),  # no entry
    ("%inner_body (t:", "%inner_body [t:"),  # in no computation
    (" = ", " := "),  # no instruction
    (" fusion(", " fusion["),  # no opcode
    ("f32[4]{0} all-reduce(", "f32[4]{0} all-reduce["),
    ("  ROOT %alone =", "  ROOT <alone> ="),  # no name
    (" all-gather-start(", " all-collect-start("),  # another opcode
    (" collective-permute(", " collective-broadcast("),
    ("body=%inner_body", "loop=%inner_body"),  # nothing calls it
    ("s32[]{:T(128)} constant(5)", "s32[]{:T(128)} parameter(1)"),  # no trips
    ("known_trip_count", "trip_count"),
    ("bf16[16]{0:T(256)} all-reduce(", "f8e4m3fn[16] all-reduce("),
    ("bf16[16]{0:T(256)} all-reduce(", "bf16<16> all-reduce("),
    ("bf16[16]{0:T(256)} all-reduce(", "bf16[<=16] all-reduce("),
    ("f32[4]{0} collective-permute(", "f32(4) collective-permute("),
    ("[4,2]<=[2,4]T(1,0)", "[4,2]<=2x4"),
    ("[4,2]<=[2,4]T(1,0)", "[4,2]<=[2,5]"),  # ten devices
    ("{{0,1,2,3},{4,5,6,7}}", "{{0..3},{4..7}}"),
    ("{{0,1,2,3},{4,5,6,7}}", "{{0,1,2,3},{4,5,6}}"),
    ("{{0,4},{4,0}}", "{0->4,4->0}"),
    ("mesh['x'=2,'y'=4] {'y'}", "mesh<'x'=2,'y'=4> {'y'}"),
    ("mesh['x'=2,'y'=4] {'y'}", "mesh['x'=2,'y'=4] {'z'}"),
    ("mesh['x'=2,'y'=4] {'y'}", "mesh['x'=2,'y'=4] {'y':2}"),
    ("  %d = f32[8,4] fusion(", "  %d = (f32[8], token[]) recv(%t), x=("),
  ],
)
def test_a_text_of_another_form_is_not_read_as_less(old, new):
  assert old in _TEXT
  with pytest.raises(hlo.UnreadableError, match="unreadable by this jax"):
    hlo.collectives(_TEXT.replace(old, new), 8)


def test_a_text_without_an_entry_is_unreadable():
  with pytest.raises(hlo.UnreadableError, match="no entry computation"):
    hlo.collectives("HloModule step\n", 8)


def test_bytes_of_shapes():
  assert hlo.shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, s32[]{:S(2)})") == 16


def test_loops_that_count_in_unsigned_integers_have_trips():
  """As XLA's own windowed matmuls do, around a ring."""
  text = _TEXT.replace(
    "%limit = s32[]{:T(128)} constant(5)",
    "%limit = u32[]{:T(128)} constant(5)",
  )
  assert text != _TEXT
  trips = {c.kind: c.trips for c in hlo.collectives(text, 8)}
  assert trips["all-reduce"] == 15


def test_what_hosts_bring_from_other_slices_is_counted():
  """Reading f32[8,2] from the other slice, in the loop of 3 trips."""
  recv = (
    "  %recv = (f32[8,2]{1,0}, u32[], token[]) recv(%token), channel_id=20,"
    " is_host_transfer=true, frontend_attributes={_xla_megascale_target="
    '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}\n'
  )
  send = recv.replace("recv", "send").replace("channel_id=20", "channel_id=21")
  place = "  %d = f32[8,4] fusion(%s)"
  text = _TEXT.replace(place, recv + send + place)
  found = [c for c in hlo.collectives(text, 8) if c.crosses]
  assert found == [hlo.Collective("all-reduce", 64, 3, 2, True)]
