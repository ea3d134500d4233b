"""Tests on several ranks with pytest.

Installing jaxfabric also installs a pytest plugin, `jaxfabric.testing.plugin`:

    import jax
    import pytest

    @pytest.mark.jaxfabric(processes=4, devices_per_process=2)
    def test_all_ranks_are_here():
        assert jax.process_count() == 4
        assert jax.device_count() == 8

The body runs on every rank of a cluster of CPU processes, with `jax.distributed`
ready and `jax.process_index()` as the rank. Fixtures, parameters, `unittest` and
absltest classes work as always; they live in the ranks, each of which has its own
`tmp_path`. The test passes if it passes on all ranks, and a skip must be decided
alike on all. Ranks are kept for the whole pytest run, so that a test costs
milliseconds; after a test that went differently on different ranks they are replaced.

Options of the mark (the one nearest to the test wins):
  processes, devices_per_process: the shape of the cluster.
  timeout_s: when it is over the stacks of all ranks are shown and the test fails; the
    run goes on. Default: `--jaxfabric-timeout-s`, ini `jaxfabric_timeout_s`, 120.
  fresh=True: a cluster of its own, which is thrown away after the test.
  lost={2}: these ranks may die or stop; the outcome of the others counts. Implies
    `fresh`. JAX aborts the survivors when its coordination service goes away, which
    is why such a cluster has the service outside of rank 0.

Once a rank has failed the others get `jaxfabric_grace_s` (10 s) to end.

Several hosts: start the same pytest once per host. The ranks of a marked test are
spread evenly over the hosts; it fails on all hosts if it fails on any.

    pytest --jaxfabric-coordinator=HOST:PORT --jaxfabric-process-id=I \\
        --jaxfabric-num-processes=N
    srun --ntasks-per-node=1 pytest --jaxfabric-coordinator=slurm

HOST is host 0, as the others reach it. Give a secret in JAXFABRIC_JOB on networks that
others use: whoever knows it (under Slurm: the job's number) may join.

`pytest -p no:jaxfabric` runs marked tests as plain ones, in the pytest process.
"""

__all__: list[str] = []  # the mark and the options are the whole surface
