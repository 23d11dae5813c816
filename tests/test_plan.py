from mst_fx.plan import ChunkPlan, chunk_bounds, plan_chunks

MLP = {"wide_bytes": 2**16, "narrow_bytes": 2**12, "accumulator_bytes": 2**24}


def test_bounds_cover_every_row_once() -> None:
    for tokens in (0, 1, 7, 8, 9, 64, 65):
        bounds = chunk_bounds(tokens, 8)
        assert [row for start, end in bounds for row in range(start, end)] == list(range(tokens))


def test_int_chunks_whatever_is_longer() -> None:
    assert plan_chunks("mlp", 9, 1, 1, 10**9, 8) == ChunkPlan(8, 2, 9, 8 + 10**9)
    assert "one chunk" in str(plan_chunks("mlp", 8, 1, 1, 0, 8))


def test_auto_leaves_small_and_unprofitable_regions_alone() -> None:
    assert isinstance(plan_chunks("mlp", 512, **MLP, chunk_tokens="auto"), str)
    assert "not worthwhile" in str(plan_chunks("mlp", 2048, 2**12, 2**8, 2**22, "auto"))


def test_auto_never_plans_more_memory_than_before_and_is_monotone() -> None:
    sizes = []
    for power in range(8, 22):
        plan = plan_chunks("mlp", 2**power, **MLP, chunk_tokens="auto")
        if isinstance(plan, ChunkPlan):
            assert plan.bytes_after <= 0.75 * plan.bytes_before
            sizes.append(plan.chunk_tokens)
    assert sizes
    assert sizes == sorted(sizes)
