// The first process of an emulated machine (bochs.py): runs every program of /programs, with its output on the first
// serial port, between a line with its name and one with its exit status, and switches the machine off.

#include <dirent.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdio>
#include <string>

int main() {
  mkdir("/dev", 0755);
  mount("devtmpfs", "/dev", "devtmpfs", 0, nullptr);
  const int port = open("/dev/ttyS0", O_RDWR);
  for (int stream = 0; stream < 3; ++stream) dup2(port, stream);
  dirent** names;
  const int count = scandir(
      "/programs", &names, [](const dirent* entry) { return int{entry->d_name[0] != '.'}; }, alphasort);
  for (int i = 0; i < count; ++i) {
    const std::string path = std::string("/programs/") + names[i]->d_name;
    std::printf("begin %s\n", names[i]->d_name);
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      execl(path.c_str(), path.c_str(), nullptr);
      _exit(127);
    }
    int status = -1;
    waitpid(child, &status, 0);
    std::printf("end %s %d\n", names[i]->d_name, status);
    std::fflush(stdout);
  }
  tcdrain(STDOUT_FILENO);
  reboot(RB_POWER_OFF);
}
