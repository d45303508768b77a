#!/bin/sh
# Installs tldr-stream into a virtual environment, as the image does: deploy/Dockerfile runs it, and `make deploy-check` runs it as an
# unprivileged user in a clean directory.
#
#   install.sh SOURCE TARGET cpu|gpu
#
# SOURCE  a folder with pyproject.toml, constraints.txt and the packages; TARGET  the new environment.
# WHEELS  (environment) a folder of wheels that are taken before those of the index, e.g. PyTorch's for CPUs alone.
set -eu
source=$1 target=$2 variant=$3

case $variant in
  cpu) faiss='' ;;
  # constraints.txt pins what is tested without a GPU; the other build of faiss is pinned here.
  gpu) faiss='faiss-gpu==1.15.1' ;;
  *) echo "install.sh: the variant is cpu or gpu, not $variant" >&2; exit 2 ;;
esac

export PIP_CONSTRAINT="$source/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
[ -z "${WHEELS:-}" ] || export PIP_FIND_LINKS="$WHEELS"

"${PYTHON:-python3}" -m venv "$target"
# What builds our own wheel is pinned, too: an isolated build would take the newest.
"$target/bin/python" -m pip install --quiet 'pip==26.3' 'setuptools==84.2.1' 'wheel==0.48.0'
# Without bytecode: a .pyc holds the time of its source, and two builds would differ.
# shellcheck disable=SC2086  # no faiss is no word
"$target/bin/python" -m pip install --quiet --no-compile --no-build-isolation "${source}[$variant,registry]" $faiss
"$target/bin/python" -m pip uninstall --quiet --yes wheel
# A few files of torch's tests are for other versions of Python and do not compile.
"$target/bin/python" -m compileall -qq --invalidation-mode unchecked-hash "$target/lib" || true
"$target/bin/python" -m pip check
