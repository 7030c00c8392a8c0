#!/usr/bin/env bash
# Two hosts on one machine: what a network of a chosen bandwidth does to data parallelism.
#
#   benchmarks/parallel/two_hosts.sh                              0.1, 1 and 10 Gbit/s, 2 ranks a host
#   benchmarks/parallel/two_hosts.sh --mbit 250 --quick
#   benchmarks/parallel/two_hosts.sh --mbit 1000 -- my_training.py --its options
#
# Each "host" is a Linux namespace of its own: network, host name and processes. A veth pair, the kernel's cable, joins
# the two, and a token bucket (tc tbf) on both ends lets only so many bits a second through. On both runs the same
# torchrun line, the one that two real machines would need.
#
# Nothing outlives this script. A host is the first process of its own process namespace and reads from a pipe that this
# script holds: if the script ends, by kill -9 even, the pipe closes, the first process ends, and the kernel kills what
# else is in the namespace and takes the cable away.
set -euo pipefail

readonly ADDRESS_0=10.77.0.1 ADDRESS_1=10.77.0.2 PORT=29400 INTERFACE=veth0
readonly CANNOT=77 # the exit status by which a test knows that it cannot run here
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SELF=$HERE/$(basename "${BASH_SOURCE[0]}")

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$SELF"
    cat <<'END'

options:
  --mbit A,B,…            bandwidths in Mbit/s (100,1000,10000)
  --ranks-per-host N      (2)
  --latency-ms X          added to each direction (0)
  --python FILE           the Python that has torch and mlsys (.venv/bin/python, or python3)
  --check                 only say whether this machine lets it run
  -- FILE ARGUMENTS       a program of yours instead of the measurement
All other options go to the measurement, `mlsys bench parallel.two_hosts parallel.two_hosts_step`: --quick, --save, …
END
}

stop() { # stop STATUS TEXT…
    local status=$1
    shift
    printf 'two_hosts.sh: %s\n' "$*" >&2
    exit "$status"
}

# --- on a host --------------------------------------------------------------------------------------------------------

# As the first process of the namespaces: wait for the cable, run the command, and end when it does or the script has.
inside() { # inside NAME ADDRESS COMMAND…
    local name=$1 address=$2 command status=0
    shift 2
    exec 3<&0 # a background job's own input is empty
    hostname "$name"
    read -r _ || exit 1 # the cable is plugged in
    ip link set lo up
    ip address add "$address/24" dev "$INTERFACE"
    ip link set "$INTERFACE" up
    "$@" </dev/null 3<&- &
    command=$!
    { read -r _ <&3 || kill -KILL "$command"; } 2>/dev/null &
    wait "$command" || status=$?
    exit "$status"
}

if [[ ${1-} == --inside ]]; then
    shift
    inside "$@"
fi

# --- what was asked for -----------------------------------------------------------------------------------------------

mbits=100,1000,10000 ranks=2 latency_ms=0 python='' only_check='' program=() options=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --mbit | --ranks-per-host | --latency-ms | --python)
            (($# > 1)) || stop 2 "$1 needs a value"
            case $1 in
                --mbit) mbits=$2 ;;
                --ranks-per-host) ranks=$2 ;;
                --latency-ms) latency_ms=$2 ;;
                --python) python=$2 ;;
            esac
            shift 2
            ;;
        --check) only_check=yes && shift ;;
        --) shift && program=("$@") && break ;;
        *) options+=("$1") && shift ;;
    esac
done
[[ $mbits =~ ^[0-9]+(,[0-9]+)*$ && ! $mbits =~ (^|,)0+(,|$) ]] ||
    stop 2 "--mbit $mbits: expected whole numbers above 0, such as 100,1000"
[[ $ranks =~ ^[1-9][0-9]?$ ]] || stop 2 "--ranks-per-host $ranks: expected a whole number from 1 to 99"
[[ $latency_ms =~ ^[0-9]+(\.[0-9]+)?$ ]] || stop 2 "--latency-ms $latency_ms: expected milliseconds, such as 0.5"
if [[ -z $python ]]; then
    python=$HERE/../../.venv/bin/python
    [[ -x $python ]] || python=$(command -v python3) || stop 2 "no python3 is on PATH: give --python FILE"
fi
[[ -x $python ]] || command -v "$python" >/dev/null || stop 2 "--python $python: there is no such program"
((${#program[@]} == 0 || ${#options[@]} == 0)) || stop 2 "unknown option ${options[0]} (a program of yours takes its own after --)"

# --- whether it can be done here --------------------------------------------------------------------------------------

[[ $(uname -s) == Linux ]] || stop $CANNOT "needs Linux: namespaces and traffic control are the kernel's"
for tool in ip:iproute2 tc:iproute2 unshare:util-linux hostname:hostname; do
    command -v "${tool%%:*}" >/dev/null ||
        stop $CANNOT "needs the program ${tool%%:*}: install the package ${tool##*:}"
done
if ((EUID != 0)); then
    # An unprivileged user may be root in a user namespace, where the system allows that.
    unshare --user --map-root-user --net true 2>/dev/null ||
        stop $CANNOT "this user may make no namespaces here: run it as root, or have the system allow user namespaces" \
            "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
    arguments=(--mbit "$mbits" --ranks-per-host "$ranks" --latency-ms "$latency_ms" --python "$python")
    [[ -z $only_check ]] || arguments+=(--check)
    arguments+=("${options[@]}")
    ((${#program[@]} == 0)) || arguments+=(-- "${program[@]}")
    exec unshare --user --map-root-user --net "$SELF" "${arguments[@]}"
fi

host=(unshare --net --uts --pid --fork --kill-child --mount-proc)
"${host[@]}" true 2>/dev/null || {
    host=(unshare --net --uts --pid --fork --kill-child) # a container may forbid to mount /proc: it is not needed
    "${host[@]}" true 2>/dev/null ||
        stop $CANNOT "the system forbids network namespaces here (a container needs --cap-add SYS_ADMIN,NET_ADMIN)"
}
shape=(root tbf rate 1000mbit burst 1mb latency 100ms)
unshare --net sh -c "ip link add name mlsys0 type veth peer name mlsys1 && tc qdisc add dev mlsys0 ${shape[*]}" >/dev/null 2>&1 ||
    stop $CANNOT "the kernel here has no veth pairs or no tbf (modules veth and sch_tbf): run it on another machine"
if [[ -n $only_check ]]; then
    echo "two_hosts.sh: this machine lets it run"
    exit 0
fi

# --- the two hosts ----------------------------------------------------------------------------------------------------

hosts=() pipes=()
unplug() { # ends both hosts; their network and cable go with them
    local pipe pid
    for pipe in "${pipes[@]}"; do
        exec {pipe}>&- || true
    done
    for pid in "${hosts[@]}"; do
        kill -KILL "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    hosts=() pipes=()
}
trap unplug EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

start() { # start NUMBER ADDRESS MBIT
    local number=$1 address=$2 mbit=$3 pipe
    local -a line=("$python" -m torch.distributed.run --nnodes 2 --node-rank "$number" --nproc-per-node "$ranks"
        --rdzv-backend static --rdzv-id "two-hosts-$mbit" --master-addr "$ADDRESS_0" --master-port "$PORT")
    if ((${#program[@]})); then
        line+=("${program[@]}")
    else
        line+=(-m mlsys bench parallel.two_hosts parallel.two_hosts_step "${options[@]}")
    fi
    exec {pipe}> >(
        for other in "${pipes[@]}"; do exec {other}>&-; done
        exec env MLSYS_LINK_MBIT="$mbit" GLOO_SOCKET_IFNAME="$INTERFACE" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TORCH_CPP_LOG_LEVEL=ERROR \
            "${host[@]}" bash "$SELF" --inside "mlsys-host-$number" "$address" "${line[@]}"
    )
    hosts+=("$!") pipes+=("$pipe")
}

for mbit in ${mbits//,/ }; do
    # The bucket holds what passes in half a millisecond, and at least one of the largest packets that a veth takes.
    # Whatever fits in it passes at once: a larger one would be a cable of no bandwidth to all but long vectors.
    burst=$((mbit * 1000000 / 8 / 2000))
    ((burst >= 70000)) || burst=70000
    queue=(tbf rate "${mbit}mbit" burst "$burst" latency 200ms)
    [[ $latency_ms == 0 ]] || queue=(netem delay "${latency_ms}ms" rate "${mbit}mbit")
    echo "two_hosts.sh: two hosts of $ranks ranks, $mbit Mbit/s between them" >&2
    start 0 "$ADDRESS_0" "$mbit"
    start 1 "$ADDRESS_1" "$mbit"
    cable=mlsys$$
    # `unshare` becomes a process of the new network before it forks; wait until it has.
    for pid in "${hosts[@]}"; do
        until [[ -e /proc/$pid/ns/net && $(readlink "/proc/$pid/ns/net") != "$(readlink /proc/self/ns/net)" ]]; do
            kill -0 "$pid" 2>/dev/null || stop 1 "a host ended before it had started"
            sleep 0.02
        done
    done
    ip link add name "${cable}a" type veth peer name "${cable}b"
    for number in 0 1; do
        end=$cable$([[ $number == 0 ]] && echo a || echo b)
        ip link set "$end" netns "${hosts[$number]}" name "$INTERFACE"
        nsenter --target "${hosts[$number]}" --net tc qdisc add dev "$INTERFACE" root "${queue[@]}"
        echo go >&"${pipes[$number]}"
    done
    status=0
    for pid in "${hosts[@]}"; do
        wait "$pid" || status=$?
    done
    unplug
    ((status == 0)) || stop "$status" "the program ended with status $status at $mbit Mbit/s"
done
