"""Collectives read from HLO text: written by hand in the forms that occur, and from a compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tilelli_jax.parallel.collectives import Collectives, read_collectives

# A loop of 4 passes, in which a gather is spread over two fusions; TPU's way to write reduce-scatter;
# a started permutation; a conditional; and a channel number that several collectives share.
HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.0 = f32[] add(%x, %y)
}

%first_fusion (p: bf16[1,32]) -> (bf16[1,32], u32[]) {
  %all-gather.1 = bf16[2,32]{1,0:T(8,128)} all-gather(%p), channel_id=15, attributes={chain_id="0"}
}

%second_fusion (p: bf16[1,32]) -> bf16[2,32] {
  ROOT %all-gather.2 = bf16[2,32]{1,0:S(1)} all-gather(%p), channel_id=15, attributes={chain_id="0"}
}

%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {
  %all-reduce.3 = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %dynamic-slice = f32[8]{0} dynamic-slice(%all-reduce.3)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = (bf16[1,32], u32[]) fusion(%p), kind=kCustom, calls=%first_fusion
  %fusion.2 = bf16[2,32] fusion(%p), kind=kOutput, calls=%second_fusion
  %all-reduce.4 = (f32[10]{0}, /*index=1*/f32[6]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
}

%condition (carry: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

%branch.0 (p: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[4]{0} all-to-all(%p), channel_id=7, replica_groups={{0,1,2,3}}
}

%branch.1 (p: f32[4]) -> f32[4] {
  ROOT %negate = f32[4]{0} negate(%p)
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  %fusion.3 = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %reduce-scatter.1 = f32[8]{0} reduce-scatter(%p), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %reduce-scatter.2 = f32[8]{0} reduce-scatter(%p), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %reduce-scatter.3 = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2},{3,4,5}}, to_apply=%add
  %collective-permute-start = (s32[16]{0}, s32[16]{0}, u32[], u32[]) collective-permute-start(%q)
  %all-gather-start = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
  %collective-permute-done = s32[16]{0} collective-permute-done(%collective-permute-start)
  ROOT %conditional = f32[4]{0} conditional(%i, %p, %p), branch_computations={%branch.0, %branch.1}
}
"""

def test_every_form():
    found = {total.kind: total for total in read_collectives(HLO)}
    assert found == {
        "all-reduce": Collectives("all-reduce", 4, 4 * 16 * 4),
        "all-gather": Collectives("all-gather", 4 + 1, 4 * 64 * 2 + 16 * 4),
        "reduce-scatter": Collectives("reduce-scatter", 4, 64 * 4 + (4 + 2 + 3) * 8 * 4),
        "collective-permute": Collectives("collective-permute", 1, 16 * 4),
        "all-to-all": Collectives("all-to-all", 1, 4 * 4)}


def test_the_largest_comes_first():
    sizes = [total.bytes for total in read_collectives(HLO)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_program_without_any():
    assert read_collectives("ENTRY %main (p: f32[4]) -> f32[4] {\n  ROOT %n = f32[4] negate(%p)\n}\n") == []


@pytest.mark.eight_devices
def test_a_scan_over_layers_stored_in_parts_gathers_each_layer_once():
    """Five layers of 64 × 64 f32 are gathered in turn, and the sum is reduced."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def loss(weights, x):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), NamedSharding(mesh, P("x"))), None
        return jax.lax.scan(layer, x, weights)[0].sum()
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    compiled = jax.jit(loss).lower(weights, x).compile()
    assert {total.kind: (total.count, total.bytes) for total in read_collectives(compiled.as_text())} == {
        "all-gather": (5, 5 * 64 * 64 * 4), "all-reduce": (1, 4)}
