"""What is read off compiled programs: pieces of the text that XLA's compilers for CPUs and TPUs write."""

import textwrap

import pytest

from zoo import hlo


def program(entry, *computations, devices=8):
    """A module with `entry`'s instructions and whole other computations."""
    blocks = [*computations, f"ENTRY %main (p: f32[8,64]) -> f32[8,64] {{\n{textwrap.indent(entry, '  ')}\n}}"]
    return f"HloModule jit_f, is_scheduled=true, num_partitions={devices}\n\n" + "\n\n".join(blocks) + "\n"


P = "%p = f32[8,64]{1,0:T(8,128)} parameter(0)"
SIZE = 8 * 64 * 4


@pytest.mark.parametrize(
    ("kind", "groups", "group", "sent"),
    [
        ("all-gather", "[4,2]<=[8]", (0, 1), SIZE),
        ("all-gather", "[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5), 3 * SIZE),
        ("all-reduce", "{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6), 2 * SIZE * 3 // 4),
        ("all-reduce", "{}", tuple(range(8)), 2 * SIZE * 7 // 8),
        ("reduce-scatter", "mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4), SIZE // 2),
        ("reduce-scatter", "mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5), SIZE * 3 // 4),
        ("all-to-all", "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6), SIZE * 3 // 4),
    ],
)
def test_a_collective_sends_what_its_group_takes(kind, groups, group, sent):
    line = f"%c.1 = f32[8,64]{{1,0}} {kind}(%p), channel_id=3, replica_groups={groups}, dimensions={{0}}"
    (found,) = hlo.collectives(program(f"{P}\n{line}"))
    assert (found.kind, found.group, found.bytes, found.count, found.overlapped) == (kind, group, sent, 1, False)


def test_a_start_and_its_done_are_one_collective():
    pair = """\
        %s.1 = (f32[8,64]{1,0}, f32[8,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), \
source_target_pairs={{0,7},{1,0}}, metadata={op_name="jit(f)/ppermute"}
        ROOT %d.1 = f32[8,64]{1,0} collective-permute-done(%s.1)"""
    (found,) = hlo.collectives(program(f"{P}\n{textwrap.dedent(pair)}"))
    assert found == ("collective-permute", SIZE, 1, (0, 7), True, "jit(f)/ppermute")


def test_operands_of_a_tuple_add_up():
    lines = f"{P}\n%q = bf16[8,64]{{1,0}} convert(%p)\n"
    lines += "%r = (f32[8,64]{1,0}, /*index=1*/bf16[8,64]{1,0}) all-reduce(%p, /*index=1*/%q), replica_groups={}"
    (found,) = hlo.collectives(program(lines))
    assert found.bytes == 2 * (SIZE + SIZE // 2) * 7 // 8


LOOP = "%w = (s32[], f32[8,64]{1,0}) while(%t), condition=%cond, body=%body"
IN_LOOP = "%r = f32[8,64]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8]"


def loop(step, limit, first, note="", direction="LT"):
    """A loop as a TPU's compiler leaves it, its counter from `first` by `step` to `limit`."""
    body = f"""\
%body (a: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {{
  %one = s32[]{{:T(128)}} constant({step})
  %a = (s32[]{{:T(128)}}, f32[8,64]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%a), index=0
  %x = f32[8,64]{{1,0}} get-tuple-element(%a), index=1
  {IN_LOOP}
  %next = s32[]{{:T(128)}} add(%i, %one)
  ROOT %out = (s32[]{{:T(128)}}, f32[8,64]{{1,0}}) tuple(%next, %r)
}}"""
    condition = f"""\
%cond (b: (s32[], f32[8,64])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant({limit})
  %b = (s32[]{{:T(128)}}, f32[8,64]{{1,0}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%b), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%j, %limit), direction={direction}
}}"""
    entry = f"{P}\n%zero = s32[]{{:T(128)}} constant({first})\n%t = (s32[], f32[8,64]{{1,0}}) tuple(%zero, %p)\n"
    return program(entry + LOOP + note, body, condition)


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (loop(1, 24, 0), 24),
        (loop(2, 9, 1), 4),
        (loop(1, 24, 0, direction="LE"), 25),
        (loop(-1, 0, 9, direction="GE"), 10),
        (loop(-2, 0, 9, direction="GT"), 5),
        (loop(1, 0, 9, direction="GT").replace("add(%i, %one)", "subtract(%i, %one)"), 9),
        (loop(1, 24, 0, note=', backend_config={"known_trip_count":{"n":"7"}}'), 7),
    ],
)
def test_what_is_in_a_loop_counts_as_often_as_it_turns(text, turns):
    assert hlo.by_kind(hlo.collectives(text)) == {"all-reduce": (turns, turns * 2 * SIZE * 7 // 8)}


def test_a_collective_in_a_loop_of_unknown_turns_is_an_error():
    endless = loop(1, 24, 0).replace("constant(24)", "iota()")
    with pytest.raises(ValueError, match="turns of the loop w is not known: Collective.*all-reduce"):
        hlo.collectives(endless)
    assert hlo.collectives(endless.replace("all-reduce", "negate")) == []
    assert [found.count for found in hlo.collectives(endless, strict=False)] == [1]


def test_a_collective_that_a_chain_of_fusions_carries_counts_once():
    gather = """all-gather(%p.0), channel_id=10, replica_groups={{0,1},{2,3}}, dimensions={0}, \
frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/dot_general"}"""
    chain = [
        f"%fused_{name} (p.0: bf16[128,16]) -> bf16[256,16] {{\n"
        f"  %p.0 = bf16[128,16]{{0,1:T(8,128)(2,1)S(1)}} parameter(0)\n"
        f"  %all-gather.{name} = bf16[256,16]{{0,1}} {gather}\n"
        f"  ROOT %c.{name} = bf16[256,16]{{0,1}} {last}\n}}"
        for name, last in {
            "start": 'custom-call(%all-gather.start), custom_call_target="AsyncCollectiveStart"',
            "middle": "copy(%all-gather.middle)",
            "done": 'custom-call(%all-gather.done), custom_call_target="AsyncCollectiveDone"',
        }.items()
    ]
    calls = [f"%f.{name} = bf16[256,16]{{0,1}} fusion(%p), calls=%fused_{name}" for name in ("start", "middle", "done")]
    (found,) = hlo.collectives(program("\n".join([P, *calls]), *chain, devices=4))
    assert found == ("all-gather", 128 * 16 * 2, 1, (0, 1), True, "jit(f)/dot_general")


def test_a_tpus_reduce_scatter_is_a_fusion():
    fused = """\
%all-reduce-scatter.26 (i: f32[8,64]) -> f32[1,64] {
  %i = f32[8,64]{1,0:T(8,128)} parameter(0)
  %r = f32[8,64]{1,0:T(8,128)} all-reduce(%i), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[1,64]{1,0:T(8,128)} slice(%r), slice={[0:1], [0:64]}
}"""
    text = program(f"{P}\n%f = f32[1,64]{{1,0}} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.26", fused)
    assert hlo.by_kind(hlo.collectives(text)) == {"reduce-scatter": (1, SIZE * 7 // 8)}


def test_bytes_of_types():
    two = "(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[5]{0:T(128)S(1)}, pred[])"
    assert hlo.array_bytes(two) == 24 + 10 + 1
    assert hlo.stored_bytes(two) == 8 * 128 * 4 + 128 * 2 + 1
    assert hlo.stored_bytes(two, on_chip=False) == 8 * 128 * 4 + 1
    assert hlo.stored_bytes("bf16[16,2048,64]{2,1,0:T(8,128)(2,1)}") == 2 * hlo.array_bytes("bf16[16,2048,64]")
    assert hlo.stored_bytes("bf16[16,2048,64]{1,2,0:T(8,128)(2,1)}") == hlo.array_bytes("bf16[16,2048,64]")
    assert hlo.stored_bytes("f32[3,5]{1,0}") == 60  # no tiles
    assert hlo.array_bytes("s4[8,2]{1,0}") == 8
    assert hlo.array_bytes("f8e4m3fn[16]{0}") == 16
