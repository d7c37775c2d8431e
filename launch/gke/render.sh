#!/usr/bin/env bash
# Starts training on GKE: fills in a JobSet and hands it to kubectl.
#   bash launch/gke/render.sh --kind=tpu --name=pagoda --image=IMAGE --nodes=16 --accelerator=tpu-v5-lite-podslice \
#     --topology=8x8 --chip=v5e -- --config=experiments/imagenet_64_to_512.py:published --workdir=gs://BUCKET/imagenet
#   bash launch/gke/render.sh --kind=gpu --name=pagoda --image=IMAGE --nodes=2 -- --config=... --workdir=gs://...
#
# --kind            tpu or gpu
# --name            of the JobSet
# --image           container image with the checkout as its working directory (launch/gke/Dockerfile)
# --nodes           hosts of the slice, or GPU machines
# --chips_per_node  default 4 (tpu), 8 (gpu)
# --accelerator     node label; default nvidia-h100-80gb (gpu); tpu: tpu-v4-podslice, tpu-v5-lite-podslice,
#                   tpu-v5p-slice, tpu-v6e-slice
# --topology        tpu: of the slice, such as 8x8 or 4x4x4
# --chip            generation for launch/xla_flags.sh; default: by --accelerator
# --spot            on spot nodes
# --dry_run         prints the JobSet instead of applying it
# Everything after -- goes to `pagoda run`. The cluster needs JobSet 0.8 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' launch/gke/render.sh; }

die() {
  echo "launch/gke/render.sh: $1" >&2
  exit 2
}

declare -A value=([NODES]=1)
kind='' spot='' dry_run=''
while (($#)); do
  case $1 in
    --kind=*) kind=${1#*=} ;;
    --name=* | --image=* | --nodes=* | --chips_per_node=* | --accelerator=* | --topology=* | --chip=*)
      key=${1%%=*}
      key=${key#--}
      value[${key^^}]=${1#*=}
      ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      value[TRAINING]="$*"
      break
      ;;
    *) die "no flag '$1'; see --help (flags of training come after --)" ;;
  esac
  shift
done

case $kind in
  tpu)
    : "${value[CHIPS_PER_NODE]:=4}"
    needed=(NAME IMAGE ACCELERATOR TOPOLOGY)
    ;;
  gpu)
    : "${value[CHIPS_PER_NODE]:=8}" "${value[ACCELERATOR]:=nvidia-h100-80gb}"
    needed=(NAME IMAGE)
    ;;
  *) die "--kind=$kind: must be tpu or gpu" ;;
esac
for key in "${needed[@]}"; do
  [[ -n ${value[$key]-} ]] || die "--${key,,} is needed"
done
[[ " ${value[TRAINING]-} " == *" --config="* && " ${value[TRAINING]-} " == *" --workdir="* ]] ||
  die "--config=... and --workdir=... are needed after --"
case ${value[ACCELERATOR]} in
  tpu-v4-*) : "${value[CHIP]:=v4}" ;;
  tpu-v5-lite-*) : "${value[CHIP]:=v5e}" ;;
  tpu-v5p-*) : "${value[CHIP]:=v5p}" ;;
  tpu-v6e-*) : "${value[CHIP]:=v6e}" ;;
  *) : "${value[CHIP]:=h100}" ;;
esac
for key in "${!value[@]}"; do
  # The values go into YAML and a shell line as they are.
  [[ ${value[$key]} =~ ^[-A-Za-z0-9_./:=,@%+\ ]*$ ]] || die "--${key,,}: characters that YAML or a shell would read"
done

text=$(<"launch/gke/jobset_$kind.yaml")
if [[ -n $spot ]]; then
  text=${text//# SPOT_SELECTOR/'cloud.google.com/gke-spot: "true"'}
else
  text=$(grep -v 'SPOT_SELECTOR' <<<"$text")
fi
for key in "${!value[@]}"; do
  text=${text//"\${$key}"/"${value[$key]}"}
done
if [[ -n $dry_run ]]; then
  echo "$text"
else
  kubectl apply -f - <<<"$text"
fi
