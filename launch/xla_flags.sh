#!/usr/bin/env bash
# Compiler flags by chip generation, each with its reason.
#   source launch/xla_flags.sh v5e      adds them to the environment, before JAX starts
#   bash launch/xla_flags.sh v5e        prints what that would export, and why (as does --dry_run)
# Generations: v4 v5e v5p v6e h100. What you set yourself comes last, so it wins.
#
# All but the two of space_to_batch are documented: in JAX's "XLA compiler flags", in the tables of MaxText's configs
# and its guide on scoped vmem, and in NVIDIA's JAX-Toolbox guide "GPU performance". They change speed, not results
# (space_to_batch: but for rounding). Left out on purpose: --xla_tpu_spmd_rng_bit_generator_unsafe, with which random
# numbers would depend on the sharding.
#
# All are known to jaxlib 0.10.2 and its libtpu, asked without a chip; what they gain was measured on none.
# For v5e, libtpu made the same program of a small step (2 x 2 chips, convolutions, parameters over fsdp) with
# all of its flags as without, and another, without asynchronous collectives, with all of them false: it has them
# on by itself. They stay for other versions of it. The two of space_to_batch, which need each other, are what its
# compiler makes much of, by its own estimate (pagoda_jax/networks/README.md, "Few images at once"). On a GPU latency
# hiding is off unless asked for.

_pagoda_flag_table() {
  cat <<'TABLE'
v4,v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_enable_async_all_gather=true|FSDP gathers parameters while the block before is still computing
v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion=true|runs collectives inside the convolutions scheduled between their start and end
v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true|the same for FSDP's all-gathers
v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_tpu_enable_async_collective_fusion_multiple_steps=true|a long collective may span several convolutions
v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_tpu_overlap_compute_collective_tc=true|overlaps computing and communication on one TensorCore
v5e,v5p,v6e|LIBTPU_INIT_ARGS|--xla_tpu_enable_data_parallel_all_reduce_opt=true|several slices: overlaps the gradients' all-reduce over the data-centre network
v5e|LIBTPU_INIT_ARGS|--xla_tpu_run_space_to_batch=false|below 8 images at once XLA lays stripes of a picture side by side as a batch, and copies their edges in every layer: 3.3 times the cycles at 4 images
v5e|LIBTPU_INIT_ARGS|--xla_tpu_run_space_to_batch_on_new_platforms=false|the other half of that switch: either alone changes nothing
v5p|LIBTPU_INIT_ARGS|--xla_tpu_megacore_fusion_allow_ags=false|as MaxText does: leaves all-gathers to the fusion above instead of MegaCore's
v6e|LIBTPU_INIT_ARGS|--xla_tpu_scoped_vmem_limit_kib=98304|v6e has 128 MiB of vector memory: more of it for the running operation, less for prefetching
h100|XLA_FLAGS|--xla_gpu_enable_latency_hiding_scheduler=true|starts collectives early and ends them late, so that they overlap with computing
h100|XLA_FLAGS|--xla_gpu_all_reduce_combine_threshold_bytes=134217728|hundreds of small gradients in a few messages
h100|XLA_FLAGS|--xla_gpu_all_gather_combine_threshold_bytes=134217728|the same for FSDP's parameters
h100|XLA_FLAGS|--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728|the same for FSDP's gradients
h100|XLA_PYTHON_CLIENT_MEM_FRACTION|0.9|JAX takes 75 % of a GPU's memory by default; the rest is for NCCL and cuDNN
TABLE
}

_pagoda_flags_of() { # generation -> its rows
  _pagoda_flag_table | awk -F'|' -v chip="$1" 'index("," $1 ",", "," chip ",")'
}

_pagoda_export_flags() { # generation: exports its flags, ours first
  local variable flag theirs_libtpu=${LIBTPU_INIT_ARGS-} theirs_xla=${XLA_FLAGS-}
  local ours_libtpu='' ours_xla=''
  while IFS='|' read -r _ variable flag _; do
    case $variable in
      LIBTPU_INIT_ARGS) ours_libtpu+="$flag " ;;
      XLA_FLAGS) ours_xla+="$flag " ;;
      *) export "$variable=${!variable-$flag}" ;;
    esac
  done < <(_pagoda_flags_of "$1")
  if [[ -n $ours_libtpu ]]; then export LIBTPU_INIT_ARGS="$ours_libtpu$theirs_libtpu"; fi
  if [[ -n $ours_xla ]]; then export XLA_FLAGS="$ours_xla$theirs_xla"; fi
}

_pagoda_explain_flags() { # generation: prints its flags with their reasons
  local variable flag reason
  while IFS='|' read -r _ variable flag reason; do
    printf '%s %s\n    %s\n' "$variable" "$flag" "$reason"
  done < <(_pagoda_flags_of "$1")
}

_pagoda_xla_flags() { # sourced or run, then the arguments
  local how=$1 chip='' argument
  shift
  for argument in "$@"; do
    case $argument in
      --dry_run) how=run ;;
      -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        return 0
        ;;
      *) chip=$argument ;;
    esac
  done
  if [[ -z $chip || -z $(_pagoda_flags_of "$chip") ]]; then
    echo "launch/xla_flags.sh: no generation '$chip'; there are v4, v5e, v5p, v6e, h100" >&2
    return 2
  fi
  if [[ $how == sourced ]]; then _pagoda_export_flags "$chip"; else _pagoda_explain_flags "$chip"; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  _pagoda_xla_flags run "$@"
else
  _pagoda_xla_flags sourced "$@"
fi
