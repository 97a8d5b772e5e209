/* Holds a pod's namespaces: sleeps until told to end, and buries orphans meanwhile. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signum) {
  (void)signum;
  _exit(0);
}

static void bury(int signum) {
  (void)signum;
  while (waitpid(-1, NULL, WNOHANG) > 0) {
  }
}

int main(void) {
  signal(SIGINT, end);
  signal(SIGTERM, end);
  signal(SIGCHLD, bury);
  for (;;) pause();
}
