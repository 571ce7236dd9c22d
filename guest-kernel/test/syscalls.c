/* Exercises the system calls containers rely on; one PASS or FAIL line each.
 * Runs as root in the guest, in the initial namespaces, from init.sh. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <mqueue.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int failures;

static void report(const char *what, int ok)
{
	if (ok) {
		printf("PASS %s\n", what);
	} else {
		printf("FAIL %s: %s\n", what, strerror(errno));
		failures++;
	}
	fflush(stdout);
}

/* A call passes when it does not fail. */
#define TRY(what, expr) (errno = 0, report(what, (long)(expr) >= 0))

/* Runs `body` in a child, which passes by returning 0. */
static void in_child(const char *what, int (*body)(void))
{
	int status = -1;
	pid_t pid = fork();

	if (pid == 0)
		_exit(body() ? (errno ? errno : 255) : 0);
	waitpid(pid, &status, 0);
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EINTR;
	report(what, errno == 0);
}

static int new_namespace;

static int unshare_one(void)
{
	return unshare(new_namespace);
}

static void namespaces(void)
{
	static const struct { const char *name; int flag; } all[] = {
		{ "mount", CLONE_NEWNS }, { "uts", CLONE_NEWUTS }, { "ipc", CLONE_NEWIPC },
		{ "user", CLONE_NEWUSER }, { "pid", CLONE_NEWPID }, { "net", CLONE_NEWNET },
		{ "cgroup", CLONE_NEWCGROUP }, { "time", 0x80 /* CLONE_NEWTIME */ },
	};
	char what[64];

	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
		new_namespace = all[i].flag;
		snprintf(what, sizeof(what), "unshare %s namespace", all[i].name);
		in_child(what, unshare_one);
	}
}

/* getpid by the 32-bit gate: only IA32 emulation answers it. */
static int int80(void)
{
	long pid;

	__asm__ volatile("int $0x80" : "=a"(pid) : "a"(20L) : "r8", "r9", "r10", "r11", "memory");
	return pid == getpid() ? 0 : -1;
}

/* A filter that turns getppid into EPERM. */
static int seccomp_filter(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
		return -1;
	errno = 0;
	return syscall(SYS_getppid) == -1 && errno == EPERM ? (errno = 0, 0) : -1;
}

/* A cgroup device program that denies everything must stop /dev/zero opening. */
static int device_bpf(void)
{
	struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr load = {
		.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insn_cnt = 2,
		.insns = (unsigned long)code, .license = (unsigned long)"GPL",
		.expected_attach_type = BPF_CGROUP_DEVICE,
	};
	int program = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof(load));
	int group = open("/sys/fs/cgroup/test", O_RDONLY | O_DIRECTORY);
	int procs = open("/sys/fs/cgroup/test/cgroup.procs", O_WRONLY);
	union bpf_attr attach = {
		.target_fd = group, .attach_bpf_fd = program,
		.attach_type = BPF_CGROUP_DEVICE,
	};

	if (program < 0 || group < 0 || procs < 0 || write(procs, "0", 1) != 1 ||
	    syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof(attach)))
		return -1;
	errno = 0;
	int denied = open("/dev/zero", O_RDONLY) == -1 && errno == EPERM;
	syscall(SYS_bpf, BPF_PROG_DETACH, &attach, sizeof(attach));
	errno = 0;
	return denied ? 0 : -1;
}

/* pids.max of the test cgroup (init.sh sets 8) must stop a fork bomb. */
static int fork_bomb(void)
{
	int procs = open("/sys/fs/cgroup/test/cgroup.procs", O_WRONLY);
	int made = 0, refused = 0;

	if (procs < 0 || write(procs, "0", 1) != 1)
		return -1;
	while (made < 64) {
		pid_t pid = fork();
		if (pid == 0) {
			pause();
			_exit(0);
		}
		if (pid < 0) {
			refused = errno == EAGAIN;
			break;
		}
		made++;
	}
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	errno = 0;
	return refused && made < 8 ? 0 : -1;
}

static int fork_bomb_in_session(void)
{
	setsid();
	return fork_bomb();
}

/* memory.max of the test cgroup (init.sh sets 16 MiB) must kill this. */
static int memory_hog(void)
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		int procs = open("/sys/fs/cgroup/test/cgroup.procs", O_WRONLY);
		if (procs < 0 || write(procs, "0", 1) != 1)
			_exit(1);
		char *hog = mmap(0, 64 << 20, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		memset(hog, 1, 64 << 20);
		_exit(2);
	}
	waitpid(pid, &status, 0);
	errno = 0;
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ? 0 : -1;
}

static int message_queue(void)
{
	mqd_t queue = mq_open("/caisson", O_CREAT | O_RDWR, 0600, NULL);

	return queue < 0 || mq_send(queue, "x", 1, 0) || mq_unlink("/caisson") ? -1 : 0;
}

static int realtime_timer(void)
{
	timer_t timer;

	return timer_create(CLOCK_MONOTONIC, NULL, &timer);
}

int main(void)
{
	char ring[128] = { 0 };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);

	namespaces();
	in_child("32-bit system calls", int80);
	in_child("seccomp filter", seccomp_filter);
	in_child("cgroup device BPF program", device_bpf);
	in_child("pids.max stops a fork bomb", fork_bomb_in_session);
	in_child("memory.max kills a hog", memory_hog);
	in_child("POSIX message queue", message_queue);
	in_child("POSIX timer", realtime_timer);

	TRY("landlock ABI", syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION) - 1);
	TRY("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
	TRY("io_uring_setup", syscall(SYS_io_uring_setup, 4, ring));
	TRY("aio", ({ unsigned long context = 0; syscall(SYS_io_setup, 4, &context); }));
	TRY("memfd_create", memfd_create("x", MFD_CLOEXEC));
	TRY("memfd_secret", syscall(447, 0));
	TRY("epoll", epoll_create1(0));
	TRY("eventfd", eventfd(0, 0));
	TRY("timerfd", timerfd_create(CLOCK_MONOTONIC, 0));
	TRY("signalfd", signalfd(-1, &set, 0));
	TRY("inotify", inotify_init1(0));
	TRY("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY));
	TRY("SysV shared memory", shmget(IPC_PRIVATE, 4096, 0600));
	TRY("SysV semaphores", semget(IPC_PRIVATE, 1, 0600));
	TRY("SysV messages", msgget(IPC_PRIVATE, 0600));
	TRY("keys", syscall(SYS_add_key, "user", "caisson", "x", 1, KEY_SPEC_PROCESS_KEYRING));
	TRY("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 2, 0, 0));
	TRY("membarrier", syscall(SYS_membarrier, 0, 0, 0));
	TRY("pidfd_open", syscall(SYS_pidfd_open, getpid(), 0));
	TRY("name_to_handle_at", ({
		struct { unsigned int bytes; int type; char data[128]; } handle = { .bytes = 128 };
		int mount_id;
		syscall(SYS_name_to_handle_at, AT_FDCWD, "/tmp", &handle, &mount_id, 0);
	}));
	TRY("new mount API", ({
		int fs = syscall(SYS_fsopen, "tmpfs", 0);
		syscall(SYS_fsconfig, fs, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0) < 0 ? -1
			: syscall(SYS_fsmount, fs, 0, 0);
	}));
	TRY("process_vm_readv", ({
		char from = 1, to = 0;
		struct iovec local = { &to, 1 }, remote = { &from, 1 };
		syscall(SYS_process_vm_readv, getpid(), &local, 1, &remote, 1, 0);
	}));
	TRY("AF_VSOCK", socket(AF_VSOCK, SOCK_STREAM, 0));
	TRY("AF_PACKET", socket(AF_PACKET, SOCK_RAW, 0));
	TRY("AF_ALG", socket(AF_ALG, SOCK_SEQPACKET, 0));
	TRY("AF_XDP", socket(AF_XDP, SOCK_RAW, 0));
	TRY("tmpfs user xattr", ({ creat("/tmp/x", 0600); setxattr("/tmp/x", "user.caisson", "1", 1, 0); }));
	TRY("tmpfs trusted xattr", setxattr("/tmp/x", "trusted.caisson", "1", 1, 0));
	TRY("ext4 user xattr", ({ creat("/mnt/ext4/x", 0600); setxattr("/mnt/ext4/x", "user.caisson", "1", 1, 0); }));
	return failures != 0;
}
