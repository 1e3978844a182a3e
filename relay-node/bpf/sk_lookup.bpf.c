/* Steers datagrams for allocated relayed ports to the wildcard socket of the worker that has the allocation.
 *
 * Everything else (other addresses, other protocols, ports that are nobody's) is left to the ordinary lookup, so that
 * whatever else runs on this machine is found as before. A datagram for an allocated port from a peer without a
 * permission (RFC 8656 section 9) is dropped here, before it takes room in the socket that all allocations share; the
 * relay checks what gets through once more.
 *
 * ./build compiles it; the object is committed, and a test compares.
 */
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))

#define AF_INET 2
#define IPPROTO_UDP 17

static void *(*bpf_map_lookup_elem)(const void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static __u64 (*bpf_ktime_get_ns)(void) = (void *)BPF_FUNC_ktime_get_ns;
static long (*bpf_sk_assign)(void *ctx, void *sk, __u64 flags) = (void *)BPF_FUNC_sk_assign;
static long (*bpf_sk_release)(void *sk) = (void *)BPF_FUNC_sk_release;

struct bpf_map_def {
	__u32 type;
	__u32 key_size;
	__u32 value_size;
	__u32 max_entries;
	__u32 map_flags;
};

/* Index of a family in everything below. */
enum { V4, V6, FAMILIES };

/* In struct steering: the port's permissions are not all in the map; the relay looks at everything. */
#define UNFILTERED 0x80

/* Written by the relay through a mapping, read here. An address is as in the packet, zeros where there is none. */
struct steering {
	__u32 address[FAMILIES][4];
	/* Worker + 1 of an allocated port, 0 of any other; perhaps with UNFILTERED. */
	__u8 owner[FAMILIES][65536];
};

/* Who may send to a relayed address; the value is until when, on CLOCK_MONOTONIC in nanoseconds. */
struct permission {
	__u32 peer[4];
	__u16 port;
	__u16 family;
};

struct bpf_map_def SEC("maps") steering = {
	.type = BPF_MAP_TYPE_ARRAY,
	.key_size = sizeof(__u32),
	.value_size = sizeof(struct steering),
	.max_entries = 1,
	.map_flags = BPF_F_MMAPABLE,
};

struct bpf_map_def SEC("maps") permissions = {
	.type = BPF_MAP_TYPE_HASH,
	.key_size = sizeof(struct permission),
	.value_size = sizeof(__u64),
	/* The relay says how many. */
	.max_entries = 1,
	.map_flags = BPF_F_NO_PREALLOC,
};

/* Worker * FAMILIES + family. */
struct bpf_map_def SEC("maps") sockets = {
	.type = BPF_MAP_TYPE_SOCKMAP,
	.key_size = sizeof(__u32),
	.value_size = sizeof(__u32),
	.max_entries = 64 * FAMILIES,
};

SEC("sk_lookup")
int relayed(struct bpf_sk_lookup *ctx)
{
	struct permission permission = {};
	__u32 index = 0;

	if (ctx->protocol != IPPROTO_UDP)
		return SK_PASS;
	struct steering *known = bpf_map_lookup_elem(&steering, &index);
	if (!known)
		return SK_PASS;

	__u32 port = ctx->local_port & 0xffff;
	__u8 owner;
	if (ctx->family == AF_INET) {
		if (ctx->local_ip4 != known->address[V4][0])
			return SK_PASS;
		owner = known->owner[V4][port];
		permission.family = V4;
		permission.peer[0] = ctx->remote_ip4;
	} else {
		if (ctx->local_ip6[0] != known->address[V6][0] || ctx->local_ip6[1] != known->address[V6][1] ||
		    ctx->local_ip6[2] != known->address[V6][2] || ctx->local_ip6[3] != known->address[V6][3])
			return SK_PASS;
		owner = known->owner[V6][port];
		permission.family = V6;
		permission.peer[0] = ctx->remote_ip6[0];
		permission.peer[1] = ctx->remote_ip6[1];
		permission.peer[2] = ctx->remote_ip6[2];
		permission.peer[3] = ctx->remote_ip6[3];
	}
	if (!owner)
		return SK_PASS;

	if (!(owner & UNFILTERED)) {
		permission.port = port;
		__u64 *until = bpf_map_lookup_elem(&permissions, &permission);
		if (!until || *until <= bpf_ktime_get_ns())
			return SK_DROP;
	}

	index = ((owner & ~UNFILTERED) - 1) * FAMILIES + permission.family;
	struct bpf_sock *socket = bpf_map_lookup_elem(&sockets, &index);
	if (!socket)
		return SK_DROP;
	/* What another program of this namespace has chosen before stays. */
	long refused = bpf_sk_assign(ctx, socket, 0);
	bpf_sk_release(socket);
	return refused ? SK_DROP : SK_PASS;
}

/* Ours; the kernel asks whether GPL is among it. */
char _license[] SEC("license") = "Dual MIT/GPL";
