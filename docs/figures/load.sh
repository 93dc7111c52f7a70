# The load in the dashboard's picture (docs/metrics.md), beside a daemon "default" and a server on port 8000:
#     sh docs/figures/load.sh DIR
generate() {
    moetier generate "$DIR" --daemon default --max-new-tokens 1000 --temperature 0.7 "$@" 'La mattina seguente' >/dev/null 2>&1
}

ask() {
    curl --silent --output /dev/null localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "La mattina seguente", "max_tokens": 500}'
}

DIR=$1
sleep 20 # at rest
generate # one client
generate & generate & generate & wait # three
sleep 15 # a pause
generate --speculate always & generate --speculate always & ask & ask & ask & ask & wait
