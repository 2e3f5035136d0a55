"""Branches, barriers, memory: what threads do to each other, and what the simulator says when they do it wrong."""

import numpy as np
import pytest
from ptx_snippets import kernel, module
from ptxsim import PtxError, Wavefronts, simulate

WORDS = np.zeros(64, np.uint32)
OWN = """
    mad.wide.u32 %rd9, %r0, 4, %rd0;
    mov.b32 %r90, global_smem;
    mad.lo.u32 %r91, %r0, 4, %r90;
    xor.b32 %r92, %r0, 32;
    mad.lo.u32 %r93, %r92, 4, %r90;
    and.b32 %r94, %r0, 31;
    mad.lo.u32 %r95, %r94, 4, %r90;
"""
"""Addresses for 64 threads: %rd9 and %r91 of the thread's own word, %r93 of its partner's in the other warp,
%r95 of a word that both warps share."""


def two_warps(body, **changes):
    return kernel(OWN + body, WORDS, **({"threads": 64, "shared": 512} | changes))


def kinds(run):
    return sorted({place.partition(": ")[2].partition(": ")[2] for place in run.faults})


# Control flow


def test_lanes_that_part_meet_again():
    run = kernel(
        """
    mad.wide.u32 %rd9, %r0, 4, %rd0;
    mov.b32 %r1, 0;
    mov.b32 %r2, 0;
$loop:
    add.u32 %r1, %r1, %r0;
    add.u32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r0;
    @%p1 bra $loop;
    and.b32 %r3, %r0, 1;
    setp.eq.u32 %p2, %r3, 0;
    @%p2 bra $even;
    add.u32 %r1, %r1, 1000;
    bra.uni $done;
$even:
    add.u32 %r1, %r1, 2000;
$done:
    shfl.sync.idx.b32 %r4, %r1, 5, 31, -1;
    add.u32 %r1, %r1, %r4;
    st.global.b32 [%rd9], %r1;
""",
        WORDS,
        threads=64,
    )
    mine = [i * (i + 1) + (1000 if i % 2 else 2000) for i in range(64)]
    assert run.array("p0").tolist() == [v + mine[i // 32 * 32 + 5] for i, v in enumerate(mine)]


def test_ctas_may_loop_differently_and_meet_their_own_barriers():
    run = kernel(
        """
    mad.wide.u32 %rd9, %r0, 4, %rd0;
    mov.u32 %r1, %ctaid.x;
    mad.wide.u32 %rd9, %r1, 256, %rd9;
    mov.b32 %r90, global_smem;
    mad.lo.u32 %r91, %r0, 4, %r90;
    xor.b32 %r92, %r0, 32;
    mad.lo.u32 %r93, %r92, 4, %r90;
    mov.b32 %r2, %r0;
    mov.b32 %r3, 0;
$loop:
    st.shared.b32 [%r91], %r2;
    bar.sync 0;
    ld.shared.b32 %r2, [%r93];
    add.u32 %r2, %r2, 100;
    bar.sync 0;
    add.u32 %r3, %r3, 1;
    setp.le.u32 %p1, %r3, %r1;
    @%p1 bra $loop;
    st.global.b32 [%rd9], %r2;
""",
        np.zeros((3, 64), np.uint32),
        threads=64,
        ctas=3,
        shared=256,
    )
    assert not run.faults
    for cta in range(3):
        want = [(i ^ 32 if cta % 2 == 0 else i) + 100 * (cta + 1) for i in range(64)]
        assert run.array("p0")[cta].tolist() == want


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $skip; bar.sync 0;\n$skip:", "deadlock"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $skip; bar.sync 0;\n$skip:", "part of a warp"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $skip; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$skip:", "part of a warp"),
        ("$again:\n    bra $again;", "does not end"),
    ],
)
def test_threads_that_never_meet(body, message, monkeypatch):
    monkeypatch.setattr("ptxsim.machine.STEP_LIMIT", 1000)
    with pytest.raises(PtxError, match=message):
        two_warps(body)


# Bounds and alignment


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd9+4];", r"global load out of bounds, at byte 256 of 'p0', which has 256"),
        ("st.global.b32 [%rd9+-4], %r0;", "global store out of bounds"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd9];", "not aligned to 8"),
        ("ld.shared.b32 %r1, [%r91+260];", "shared access of 4 bytes at byte 512 is out of bounds"),
        ("ld.shared.b32 %r1, [0];", "no declared register|out of bounds"),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r91];", "misaligned"),
    ],
)
def test_accesses_out_of_bounds_or_misaligned(body, message):
    with pytest.raises(PtxError, match=message):
        two_warps(body)


def test_a_masked_access_out_of_bounds_is_none():
    run = two_warps(
        "setp.lt.u32 %p1, %r0, 63; mov.b32 %r1, 5; @%p1 ld.global.b32 %r1, [%rd9+4]; st.global.b32 [%rd9], %r1;"
    )
    assert run.array("p0").tolist() == [0] * 63 + [5]


# Races in shared memory: each with the barrier that cures it

COPY = "cp.async.ca.shared.global [%r91], [%rd9], 0x4; cp.async.commit_group;"
STORE, THEIRS, OTHERS = "st.shared.b32 [%r91], %r0;", "ld.shared.b32 %r1, [%r93];", "st.shared.b32 [%r93], %r0;"
RACES = {
    "read after write": (STORE, THEIRS, "reads shared bytes that another warp wrote, no barrier between"),
    "write after read": (
        STORE + " bar.sync 0; " + THEIRS, STORE, "overwrites shared bytes that another warp reads, no barrier between"),
    "write after write": (STORE, OTHERS, "overwrites shared bytes that another warp wrote, no barrier between"),
    "copy not waited for": (COPY + " bar.sync 0; ", THEIRS, "reads shared bytes that a cp.async may still write"),
    "copy waited for, no barrier": (
        COPY + " cp.async.wait_group 0;", THEIRS, "reads shared bytes that another warp wrote, no barrier between"),
    "copy over what is read": (
        STORE + " bar.sync 0; " + THEIRS, COPY, "overwrites shared bytes that another warp reads, no barrier between"),
    "write under a copy": (COPY, STORE, "overwrites shared bytes that a cp.async may still write"),
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_races_are_seen_and_barriers_cure_them(name):
    first, second, kind = RACES[name]
    assert kinds(two_warps(first + second)) == [kind]
    assert not two_warps(f"{first} cp.async.wait_all; bar.sync 0; {second}").faults


def test_a_copy_that_nobody_waits_for_is_a_race_even_for_its_own_thread():
    own = "ld.shared.b32 %r1, [%r91];"
    assert kinds(two_warps(COPY + own)) == ["reads shared bytes that a cp.async may still write"]
    assert not two_warps(COPY + "cp.async.wait_group 0;" + own).faults


def test_wait_group_counts_groups_from_the_youngest():
    copies = COPY + "cp.async.ca.shared.global [%r91+256], [%rd9], 0x4; cp.async.commit_group;"
    old, young = "ld.shared.b32 %r1, [%r91];", "ld.shared.b32 %r1, [%r91+256];"
    assert not two_warps(copies + "cp.async.wait_group 1;" + old).faults
    assert two_warps(copies + "cp.async.wait_group 1;" + young).faults
    assert two_warps(copies + "cp.async.wait_group 2;" + old).faults
    assert not two_warps(copies + "cp.async.wait_group 0;" + young).faults


def test_two_warps_may_write_the_same_value():
    same = "mov.b32 %r1, 7; st.shared.b32 [%r95], %r1;"
    differ = "st.shared.b32 [%r95], %r0;"
    assert not two_warps(same).faults
    assert kinds(two_warps(differ)) == ["two threads write different values to one shared byte"]


def test_lanes_of_a_warp_are_ordered():
    within = (
        "xor.b32 %r96, %r0, 1; mad.lo.u32 %r96, %r96, 4, %r90; st.shared.b32 [%r91], %r0; ld.shared.b32 %r1, [%r96];"
    )
    assert not two_warps(within).faults


def test_shared_memory_that_nothing_wrote_is_named():
    assert kinds(two_warps("ld.shared.b32 %r1, [%r91];")) == ["reads shared bytes that nothing wrote"]


def test_a_copy_is_zero_where_src_size_is():
    run = kernel(
        OWN + "setp.lt.u32 %p1, %r0, 40; selp.b32 %r1, 4, 0, %p1;"
        "cp.async.ca.shared.global [%r91], [%rd9], 0x4, %r1; cp.async.wait_all; ld.shared.b32 %r2, [%r91];"
        "st.global.b32 [%rd9], %r2;",
        np.arange(1, 65, dtype=np.uint32),
        threads=64,
        shared=256,
    )
    assert run.array("p0").tolist() == [*range(1, 41)] + [0] * 24
    assert run.traffic("p0").bytes == 160


def test_ctas_must_not_depend_on_each_other():
    mine = "mov.u32 %r1, %ctaid.x;"
    assert kinds(two_warps(mine + "st.global.b32 [%rd9], %r1;", ctas=2)) != []
    assert not two_warps("mov.b32 %r1, 3; st.global.b32 [%rd9], %r1;", ctas=2).faults
    reads = two_warps("setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd9], %r0; ld.global.b32 %r1, [%rd0];", ctas=2)
    assert kinds(reads) == ["reads what another CTA wrote"]


# Counting


@pytest.mark.parametrize(
    ("stride", "size", "want"),
    [
        (4, 4, (1, 1)),
        (8, 4, (2, 1)),
        (128, 4, (32, 1)),
        (132, 4, (1, 1)),
        (0, 4, (1, 1)),  # one word: a broadcast
        (8, 8, (2, 2)),
        (16, 8, (4, 2)),
        (16, 16, (4, 4)),
        (32, 16, (8, 4)),
        (1, 1, (1, 1)),
        (2, 2, (1, 1)),
    ],
)
def test_bank_conflicts(stride, size, want):
    vector = {1: "b8 %rs1", 2: "b16 %rs1", 4: "b32 %r1", 8: "v2.b32 {%r1, %r2}", 16: "v4.b32 {%r1, %r2, %r3, %r4}"}
    run = kernel(
        f"mov.b32 %r90, global_smem; mad.lo.u32 %r91, %r0, {stride}, %r90; ld.shared.{vector[size]}, [%r91];",
        shared=4608,
    )
    assert run.wavefronts == {"load": Wavefronts(*want)}


def test_bank_conflicts_of_ldmatrix():
    body = "mov.b32 %r90, global_smem; mad.lo.u32 %r91, %r0, {}, %r90;"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r91];"
    for stride, wavefronts in ((16, 4), (32, 8), (128, 32), (144, 4)):
        run = kernel(body.format(stride), shared=4608)
        assert run.wavefronts["ldmatrix"] == Wavefronts(wavefronts, 4)


def test_sectors_per_request():
    words = np.zeros(1024, np.uint32)
    for stride, sectors in ((4, 4), (8, 8), (32, 32), (0, 1)):
        run = kernel(f"mad.wide.u32 %rd9, %r0, {stride}, %rd0; ld.global.b32 %r1, [%rd9];", words)
        traffic = run.traffic("p0")
        assert (traffic.requests, traffic.sectors, traffic.distinct, traffic.bytes) == (1, sectors, sectors, 128)
    twice = kernel("mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.b32 %r1, [%rd9]; ld.global.b32 %r1, [%rd9];", words)
    assert (twice.traffic("p0").sectors, twice.traffic("p0").distinct) == (8, 4)
    stored = kernel("mad.wide.u32 %rd9, %r0, 4, %rd0; st.global.b32 [%rd9], %r0;", words)
    assert stored.traffic("p0").sectors == 0 and stored.traffic("p0", "store").sectors == 4


# Launches


def test_arguments_are_checked():
    text = module("    ld.param.b64 %rd1, [p0];", 1, 32)
    with pytest.raises(PtxError, match="2 arguments for 1"):
        simulate(text, (1,), {"a": WORDS, "b": WORDS}, 0)
    with pytest.raises(PtxError, match="no parameter 'p7'"):
        simulate(text.replace("[p0]", "[p7]"), (1,), {"a": WORDS}, 0)
    with pytest.raises(PtxError, match="array"):
        simulate(text.replace(".u64 .ptr .global .align 1", ".u32"), (1,), {"a": WORDS}, 0)
    with pytest.raises(PtxError, match="one .entry"):
        simulate("// nothing", (1,), {}, 0)
    with pytest.raises(PtxError, match="whole warps"):
        simulate(module("", 0, 33), (1,), {}, 0)


def test_a_null_pointer_is_out_of_bounds():
    with pytest.raises(PtxError, match="before every buffer"):
        simulate(module("    ld.param.b64 %rd1, [p1];\n    ld.global.b32 %r1, [%rd1];", 2, 32), (1,), {"a": WORDS}, 0)


def test_one_array_under_two_names_is_one_buffer():
    body = (
        "ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; mad.wide.u32 %rd9, %r0, 4, %rd1; st.global.b32 [%rd9], %r0;"
    )
    shared = np.zeros(32, np.uint32)
    run = simulate(module(body, 2, 32), (1,), {"a": shared, "b": shared}, 0)
    assert run.array("a").tolist() == run.array("b").tolist() == list(range(32))
    assert run.traffic("a", "store") == run.traffic("b", "store")
    apart = simulate(module(body, 2, 32), (1,), {"a": shared, "b": shared.copy()}, 0)
    assert not apart.array("a").any()
