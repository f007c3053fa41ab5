"""What the environment says of a job of several processes."""

import pytest

from tav_jax.parallel.processes import Job, read_job

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}
EXPLICIT = {
    "TAV_JAX_COORDINATOR": "node01:1234",
    "TAV_JAX_NUM_PROCESSES": "4",
    "TAV_JAX_PROCESS_ID": "3",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="nothing"),
        pytest.param(BATCH_SCRIPT, id="SLURM's batch script"),
        pytest.param(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, id="a step of one task"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, id="mpirun -n 1"),
        pytest.param(SLURM | {"TAV_JAX_NUM_PROCESSES": "1"}, id="said to be alone"),
    ],
)
def test_one_process_is_no_job(environment):
    assert read_job(environment) is None


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        pytest.param(EXPLICIT, Job(4, 3, "deactivate", coordinator="node01:1234"), id="explicit"),
        pytest.param(SLURM | EXPLICIT, Job(4, 3, "deactivate", "node01:1234"), id="goes first"),
        pytest.param(SLURM, Job(8, 5, "slurm"), id="srun"),
        pytest.param(OPEN_MPI, Job(2, 1, "ompi"), id="mpirun"),
        pytest.param(SLURM | OPEN_MPI, Job(2, 1, "ompi"), id="mpirun under SLURM"),
        pytest.param(
            SLURM | {"SLURM_STEP_NUM_NODES": "8"},
            Job(8, 5, "slurm", one_gpu_each=False),
            id="one task a node has all its GPUs",
        ),
        pytest.param(
            SLURM | {"SLURM_GPUS_PER_TASK": "1"},
            Job(8, 5, "slurm", one_gpu_each=False),
            id="a task that sees its own GPUs only",
        ),
        pytest.param(
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            Job(2, 1, "ompi", one_gpu_each=False),
            id="one rank a node has all its GPUs",
        ),
        pytest.param(
            EXPLICIT | {"TAV_JAX_HEARTBEAT_SECONDS": "9", "TAV_JAX_START_SECONDS": "60"},
            Job(4, 3, "deactivate", "node01:1234", heartbeat_seconds=9, start_seconds=60),
            id="times",
        ),
    ],
)
def test_a_job_is_read_from_the_environment(environment, job):
    assert read_job(environment) == job


@pytest.mark.parametrize(
    ("environment", "problems"),
    [
        pytest.param(
            {"TAV_JAX_PROCESS_ID": "1"},
            ["TAV_JAX_COORDINATOR: not set", "TAV_JAX_NUM_PROCESSES: not set"],
            id="some of three",
        ),
        pytest.param(
            {
                "TAV_JAX_COORDINATOR": "node01",
                "TAV_JAX_NUM_PROCESSES": "none",
                "TAV_JAX_PROCESS_ID": "-1",
                "TAV_JAX_HEARTBEAT_SECONDS": "0",
                "TAV_JAX_START_SECONDS": "1.5",
            },
            [
                "TAV_JAX_COORDINATOR: expected host:port, got 'node01'",
                "TAV_JAX_NUM_PROCESSES: expected a whole number from 1 on, got 'none'",
                "TAV_JAX_PROCESS_ID: expected a whole number from 0 on, got '-1'",
                "TAV_JAX_HEARTBEAT_SECONDS: expected a whole number from 1 on, got '0'",
                "TAV_JAX_START_SECONDS: expected a whole number from 1 on, got '1.5'",
            ],
            id="no numbers",
        ),
        pytest.param(
            EXPLICIT | {"TAV_JAX_PROCESS_ID": "4"},
            ["TAV_JAX_PROCESS_ID: expected 0 to 3, got '4'"],
            id="counted from 1",
        ),
        pytest.param(
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            [
                "OMPI_COMM_WORLD_LOCAL_RANK: not set, though OMPI_COMM_WORLD_SIZE is 2; set",
                "OMPI_MCA_orte_hnp_uri: not set, though OMPI_COMM_WORLD_SIZE is 2; set",
            ],
            id="an MPI that JAX does not know",
        ),
    ],
)
def test_an_incomplete_job_is_refused_with_all_that_is_wrong(environment, problems):
    with pytest.raises(ValueError, match="TAV_JAX") as refusal:
        read_job(environment)
    lines = str(refusal.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(problem)
