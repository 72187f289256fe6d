/* Runs a program that gets no sockets of one kind, as on a kernel without it: deny netfilter|ipv6 COMMAND...
 *
 *   netfilter   netlink of nftables (EPROTONOSUPPORT)
 *   ipv6        EAFNOSUPPORT
 *
 * For whoever runs on the machine's own architecture, in the little-endian order of its words. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(what) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, what))
/* Goes on if it is this, else skips so many. */
#define IF(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define ANSWER(code) BPF_STMT(BPF_RET | BPF_K, code)

int main(int count, char **words) {
  struct sock_filter netfilter[] = {
      LOAD(nr), IF(SYS_socket, 5), LOAD(args[0]), IF(AF_NETLINK, 3), LOAD(args[2]), IF(NETLINK_NETFILTER, 1),
      ANSWER(SECCOMP_RET_ERRNO | EPROTONOSUPPORT), ANSWER(SECCOMP_RET_ALLOW)};
  struct sock_filter ipv6[] = {
      LOAD(nr), IF(SYS_socket, 3), LOAD(args[0]), IF(AF_INET6, 1),
      ANSWER(SECCOMP_RET_ERRNO | EAFNOSUPPORT), ANSWER(SECCOMP_RET_ALLOW)};
  struct sock_fprog program = {sizeof netfilter / sizeof *netfilter, netfilter};
  if (count > 2 && strcmp(words[1], "ipv6") == 0) {
    program = (struct sock_fprog){sizeof ipv6 / sizeof *ipv6, ipv6};
  } else if (count < 3 || strcmp(words[1], "netfilter") != 0) {
    fputs("usage: deny netfilter|ipv6 COMMAND...\n", stderr);
    return 2;
  }
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
    perror("deny");
    return 99;
  }
  execvp(words[2], words + 2);
  perror(words[2]);
  return 99;
}
