#!/bin/busybox sh
# PID 1 of the test guest: tries every feature the kernel promises and prints a
# PASS or FAIL line for each. The root is a read-only EROFS (vda); vdb is ext4.
export PATH=/bin:/sbin:/usr/sbin:/usr/bin

failures=0
pass() { echo "PASS $*"; }
fail() { echo "FAIL $*"; failures=$((failures + 1)); }
# try WHAT COMMAND...: passes when the command does; its output shows a failure.
try() {
    what=$1; shift
    if output=$("$@" 2>&1); then pass "$what"; else fail "$what: $output"; fi
}
refuse() {
    what=$1; shift
    if "$@" >/dev/null 2>&1; then fail "$what"; else pass "$what"; fi
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run

# --- file systems
try "root is erofs" grep -q ' / erofs ro' /proc/mounts
refuse "root is read-only" touch /written
try "devtmpfs is mounted by the kernel" grep -q ' /dev devtmpfs' /proc/mounts
mkdir /dev/pts /dev/shm /dev/mqueue
try "devpts" mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
try "mqueue" mount -t mqueue mqueue /dev/mqueue
try "tmpfs with quota" mount -t tmpfs -o size=16m,usrquota tmpfs /tmp
try "hugetlbfs" mount -t hugetlbfs hugetlbfs /mnt/huge
try "binfmt_misc" mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
try "ext4 with project quota" mount -t ext4 -o prjquota /dev/vdb /mnt/ext4
mkdir /mnt/ext4/upper /mnt/ext4/work
try "overlay over erofs, all features" mount -t overlay overlay \
    -o lowerdir=/lower,upperdir=/mnt/ext4/upper,workdir=/mnt/ext4/work,redirect_dir=on,index=on,metacopy=on,xino=on \
    /mnt/overlay
try "overlay renames a lower directory" mv /mnt/overlay/dir /mnt/overlay/renamed
try "overlay keeps its content" grep -q hello /mnt/overlay/renamed/file
try "overlay removes a lower file" rm /mnt/overlay/gone
try "overlay leaves a whiteout" test -c /mnt/ext4/upper/gone
try "tmpfs takes a file" dd if=/dev/vda of=/tmp/disk bs=64k count=16
try "loop device" losetup -f /tmp/disk
for fs in fuse virtiofs erofs ext4 overlay cgroup2 devpts mqueue; do
    try "$fs is registered" grep -qw "$fs" /proc/filesystems
done

# --- cgroup v2
try "cgroup2" mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in cpuset cpu io memory hugetlb pids misc; do
    try "controller $controller" grep -qw "$controller" /sys/fs/cgroup/cgroup.controllers
done
echo "+cpu +cpuset +io +memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/test
set_limit() { echo "$2" >"/sys/fs/cgroup/test/$1"; }
try "CFS bandwidth" set_limit cpu.max "50000 100000"
try "CPU set" set_limit cpuset.cpus 0
try "I/O throttling" set_limit io.max "254:0 rbps=1048576"
try "pids limit" set_limit pids.max 8
try "memory limit" set_limit memory.max 16M
try "freezer" set_limit cgroup.freeze 0
for resource in cpu io memory; do
    try "pressure of $resource" grep -q avg10 "/sys/fs/cgroup/test/$resource.pressure"
done

# --- devices and platform
for driver in virtio_blk virtio_net virtio_console virtio_rng virtio_balloon virtio_mem \
    virtio_pmem virtiofs vmw_vsock_virtio_transport; do
    try "driver $driver" test -d "/sys/bus/virtio/drivers/$driver"
done
try "virtio-mmio can be bound by hand" test -w /sys/bus/platform/drivers/virtio-mmio/bind
try "hwrng is virtio" grep -q virtio /sys/class/misc/hw_random/rng_current
try "hwrng gives bytes" dd if=/dev/hwrng of=/dev/null bs=16 count=1
try "hvc0" sh -c 'echo caisson-on-hvc0 >/dev/hvc0'
try "two processors" test "$(nproc)" = 2
try "processor 1 goes" sh -c 'echo 0 >/sys/devices/system/cpu/cpu1/online'
try "processor 1 comes back" sh -c 'echo 1 >/sys/devices/system/cpu/cpu1/online'
try "two processors again" test "$(nproc)" = 2
try "hotplugged memory goes online" grep -q online /sys/devices/system/memory/auto_online_blocks
try "transparent huge pages on madvise" grep -q '\[madvise\]' /sys/kernel/mm/transparent_hugepage/enabled
try "no I/O scheduler" grep -q '\[none\]' /sys/block/vda/queue/scheduler
try "/proc/config.gz" sh -c 'zcat /proc/config.gz | grep -q "^CONFIG_KVM_GUEST=y"'
refuse "no modules" test -e /proc/modules
refuse "no /dev/mem" test -e /dev/mem
refuse "no /dev/port" test -e /dev/port

# --- system calls
syscalls || failures=$((failures + 1))

# --- network
try "loopback" /usr/sbin/ip link set lo up
try "virtio-net" /usr/sbin/ip link show eth0
for kind in dummy ifb bridge vxlan macvlan ipvlan vlan wireguard; do
    parent=
    set --
    case $kind in
        vxlan) set -- id 7 dstport 4789 ;;
        macvlan | ipvlan) parent="link eth0" ;;
        vlan) parent="link eth0"; set -- id 5 ;;
    esac
    # shellcheck disable=SC2086
    try "link $kind" /usr/sbin/ip link add t-$kind $parent type $kind "$@"
    /usr/sbin/ip link del t-$kind 2>/dev/null
done
try "link veth" /usr/sbin/ip link add t-a type veth peer name t-b
try "link tap" /usr/sbin/ip tuntap add dev t-tap mode tap
try "tc ingress + mirred" sh -c '/usr/sbin/tc qdisc add dev t-a ingress && /usr/sbin/tc filter add dev t-a ingress matchall action mirred egress redirect dev t-tap'
try "tc clsact + flower + police" sh -c '/usr/sbin/tc qdisc add dev t-b clsact && /usr/sbin/tc filter add dev t-b egress protocol ip flower ip_proto tcp action police rate 1mbit burst 10k'
try "tc u32" /usr/sbin/tc filter add dev t-b ingress protocol ip u32 match ip dst 10.0.0.0/8 action drop
for qdisc in "htb default 1" "tbf rate 1mbit burst 10k latency 1s" "netem delay 1ms" fq_codel fq sfq; do
    # shellcheck disable=SC2086
    try "qdisc $qdisc" /usr/sbin/tc qdisc replace dev t-tap root $qdisc
    /usr/sbin/tc qdisc del dev t-tap root 2>/dev/null
done
try "policy routing" /usr/sbin/ip rule add fwmark 1 lookup 100
try "IPv6 policy routing" /usr/sbin/ip -6 rule add fwmark 1 lookup 100
try "bbr" sh -c 'echo bbr >/proc/sys/net/ipv4/tcp_congestion_control'
try "bridge netfilter" test -e /proc/sys/net/bridge/bridge-nf-call-iptables
try "nftables" nft -f /rules.nft
try "nftables keep the rules" sh -c 'nft list ruleset | grep -q masquerade'
for table in "inet caisson" "ip tp" "bridge br" "arp a" "netdev n"; do
    # shellcheck disable=SC2086
    try "nftables table $table" nft list table $table
done
for set in hash:ip hash:net hash:ip,port bitmap:port list:set; do
    case $set in
        bitmap:port) try "ipset $set" ipset create "s-$set" "$set" range 1-1000 ;;
        *) try "ipset $set" ipset create "s-$set" "$set" ;;
    esac
done
# rule VERSION TABLE CHAIN ARGS...
rule() {
    iptables=iptables-legacy
    [ "$1" = 6 ] && iptables=ip6tables-legacy
    table=$2; chain=$3; shift 3
    try "$iptables $table $chain $*" $iptables -w -t "$table" -A "$chain" "$@"
}
for version in 4 6; do
    rule $version filter INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    rule $version filter INPUT -m addrtype --dst-type LOCAL -m comment --comment c -j ACCEPT
    rule $version filter INPUT -p tcp -m multiport --dports 1,2 -m recent --set -j REJECT
    rule $version filter INPUT -m statistic --mode random --probability 0.5 -m mark --mark 1 -j DROP
    rule $version filter INPUT -m limit --limit 1/s -j LOG
    rule $version filter INPUT -p tcp -m tcp --dport 80 -m hashlimit --hashlimit-upto 1/s --hashlimit-name h -j ACCEPT
    rule $version filter OUTPUT -m owner --uid-owner 1337 -j RETURN
    rule $version filter OUTPUT -m cgroup --path test -j ACCEPT
    rule $version filter INPUT -p udp -m udp --dport 53 -m string --algo bm --string x -j NFLOG
    rule $version nat POSTROUTING -j MASQUERADE
    rule $version nat PREROUTING -p tcp -j REDIRECT --to-ports 15001
    rule $version mangle PREROUTING -p tcp -m socket -j MARK --set-mark 1
    rule $version mangle PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1
    rule $version mangle FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
    rule $version mangle OUTPUT -j CONNMARK --save-mark
    rule $version raw PREROUTING -j CT --notrack
done
rule 4 nat PREROUTING -p tcp -j DNAT --to-destination 10.0.0.1:80
rule 6 nat PREROUTING -p tcp -j DNAT --to-destination '[fd00::1]:80'
rule 4 filter INPUT -m set --match-set s-hash:ip src -j ACCEPT

# --- the kernel itself is content
bad=$(dmesg | grep -E 'WARNING:|BUG:|Oops|unregister_netdevice: waiting' | head -n 3)
if [ -z "$bad" ]; then pass "no kernel warnings"; else fail "no kernel warnings: $bad"; fi

umount /mnt/overlay
umount /mnt/ext4
if [ "$failures" = 0 ]; then echo "RESULT all passed"; else echo "RESULT $failures failed"; fi
reboot -f
