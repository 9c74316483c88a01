"""What is left of memory and CPUs, read from folders that look like the kernel's."""

from launcher import machine_limits as limits


def test_cgroups_of_version_2(tmp_path):
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job / "memory.current").write_text("5\n")
    (job.parent / "memory.max").write_text("4096\n")
    (job.parent / "memory.current").write_text("1100\n")
    (job.parent / "memory.stat").write_text("anon 100\ninactive_file 1000\n")
    (job / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    own = "0::/slurm/job_1\n"
    assert limits.cgroup_memory(tmp_path, own) == (4096, 100)
    assert limits.cgroup_cpus(tmp_path, own) == 1.5


def test_cgroups_of_version_1(tmp_path):
    for controller in ("memory", "cpu"):
        (tmp_path / controller / "docker").mkdir(parents=True)
    (tmp_path / "memory" / "docker" / "memory.limit_in_bytes").write_text("8192\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    (tmp_path / "cpu" / "docker" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu" / "docker" / "cpu.cfs_period_us").write_text("100000\n")
    own = "5:memory:/docker\n4:cpu,cpuacct:/docker\n0::/\n"
    assert limits.cgroup_memory(tmp_path, own) == (8192, None)
    assert limits.cgroup_cpus(tmp_path, own) == 4.0


def test_no_cgroups(tmp_path):
    assert limits.cgroup_memory(tmp_path, "") == (None, None)
    assert limits.cgroup_cpus(tmp_path, "") is None


def test_the_kernels_estimate_of_memory():
    assert limits.available_memory("MemTotal: 9 kB\nMemAvailable:   2048 kB\n") == 2 << 20
    assert limits.available_memory("") is None


def test_free_memory_is_the_least_that_is_left(tmp_path):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    assert limits.free_memory_bytes(cgroups, proc) is None
    (proc / "meminfo").write_text("MemAvailable:   4 kB\n")
    (proc / "self" / "cgroup").write_text("0::/\n")
    assert limits.free_memory_bytes(cgroups, proc) == 4096
    (cgroups / "memory.max").write_text("5000\n")
    (cgroups / "memory.current").write_text("2000\n")
    assert limits.free_memory_bytes(cgroups, proc) == 3000
