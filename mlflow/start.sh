#!/usr/bin/env bash
# The MLflow tracking server on loopback. Settings are environment variables:
#   HOST (127.0.0.1)  PORT (5000)  STORE (sqlite:///<this folder>/ersim.db)  ARTIFACTS (<this folder>/artifacts)
#   PYTHON (../.venv/bin/python)
# With PostgreSQL: STORE=postgresql://user@host/db and `pip install "psycopg[binary]"`.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
set -a
# shellcheck disable=SC1091
source "$here/server.env"
set +a
cd "$here/.."
exec "${PYTHON:-$here/../.venv/bin/python}" -m mlflow server \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers 1 \
  --backend-store-uri "${STORE:-sqlite:///$here/ersim.db}" \
  --artifacts-destination "${ARTIFACTS:-$here/artifacts}"
