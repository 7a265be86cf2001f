# From uv's output to requirements.lock: torch is pinned by version only, since which build of it fits depends on the
# machine; the CUDA packages that torch pins itself come with it.
/^[a-z]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ }
/^torch==/ { split($1, pin, " "); torch = pin[1] }
!skip { kept = kept $0 "\n" }
END {
    print "# Made by `make lock` from pyproject.toml; do not edit."
    print "# " torch " (no hash: which build fits depends on the machine)"
    printf "%s", kept
}
