"""Programs in tests run for moments and are compiled for seconds: without LLVM's optimisation a third less of them, and
without MLIR's emitters of fusions another third."""

XLA_FLAGS = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
# Compiler options of what is to be the same in batches or maps of another size, which without emitters are rounded
# otherwise.
SAME_ANY_SIZE = {'xla_cpu_use_fusion_emitters': True}
