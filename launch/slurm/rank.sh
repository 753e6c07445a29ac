#!/usr/bin/env bash
# One task of a job: rank.sh ENV_FILE SCRIPT.py ARGUMENT ... reads the environment file on its node, then is the script.
set -euo pipefail
trap 'exit 85' USR1 TERM # until Python stands: nothing is begun, so nothing has to be saved
# shellcheck source=launch/arguments.sh
source "${BASH_SOURCE[0]%/*}/../arguments.sh"
ENV_FILE=$1
shift
use_environment
exec "$MELLOW_PYTHON" "$@"
