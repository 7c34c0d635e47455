#!/usr/bin/env bash
# A two-node Slurm on one machine, for tests: a controller and two slurmd on loopback, with a munge of their own.
#
#   cluster.sh install        Debian's packages (as root)
#   cluster.sh start DIR      start everything; DIR holds configuration, sockets, spools and logs
#   cluster.sh kill DIR NODE  a node dies: its slurmd and all that it runs
#   cluster.sh node DIR NODE  the node comes back
#   cluster.sh stop DIR       end everything
#
# Wants root: slurmd starts jobs as their users. Ask the cluster with SLURM_CONF=DIR/slurm.conf in the environment.
set -euo pipefail

verb=${1:?install, start, kill, node or stop}
if [ "$verb" = install ]; then
  if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurmctld slurmd slurm-client munge
  fi
  exit
fi

dir=$(realpath -m "${2:?a folder}")
conf=$dir/slurm.conf
export SLURM_CONF=$conf
nodes=(trefoil-n1 trefoil-n2)

case $verb in
start)
  mkdir -p "$dir"/{spool,state,log,run}
  chmod 755 "$dir"
  for node in "${nodes[@]}"; do
    # TorchX lets ranks meet at the name of the first node.
    grep -q " $node$" /etc/hosts || echo "127.0.0.1 $node" >>/etc/hosts
    mkdir -p "$dir/spool/$node"
  done
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 400 "$dir/munge.key"
  munged --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
  cat >"$conf" <<CONF
ClusterName=trefoil
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=17100
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
# A node that says nothing for so long is down, and its jobs are requeued.
SlurmdTimeout=10
KillWait=15
MessageTimeout=10
RebootProgram=/bin/true
NodeName=trefoil-n[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=8 RealMemory=65536
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  slurmctld -i
  for node in "${nodes[@]}"; do slurmd -N "$node"; done
  for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null || true)" = 2 ] && exit 0
    sleep 0.5
  done
  echo "the cluster did not come up in 30 s; see $dir/log" >&2
  tail -n 5 "$dir"/log/*.log >&2
  exit 1
  ;;
kill)
  node=${3:?a node}
  # slurmd and its step daemons first, so that none can tell the controller what has ended: the machine is just gone.
  kill -KILL "$(cat "$dir/run/slurmd.$node.pid")"
  tasks=$(grep -lz "^SLURMD_NODENAME=$node$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 || true)
  for pid in $tasks; do
    parent=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null || true)
    if [ -n "$parent" ] && [ "$(cat "/proc/$parent/comm" 2>/dev/null)" = slurmstepd ]; then kill -KILL "$parent" || true; fi
  done
  for pid in $tasks; do kill -KILL "$pid" 2>/dev/null || true; done
  ;;
node)
  slurmd -N "${3:?a node}"
  ;;
stop)
  scancel --signal=KILL --user=root 2>/dev/null || true
  for pid in "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid" "$dir/run/munged.pid"; do
    [ -f "$pid" ] || continue
    number=$(cat "$pid")
    kill "$number" 2>/dev/null || true
    # Its port is free for the next cluster only when it has gone.
    for _ in $(seq 100); do kill -0 "$number" 2>/dev/null || break; sleep 0.1; done
  done
  for node in "${nodes[@]}"; do sed "/ $node\$/d" /etc/hosts >"$dir/hosts" && cat "$dir/hosts" >/etc/hosts; done
  ;;
*)
  echo "unknown: $verb" >&2
  exit 2
  ;;
esac
