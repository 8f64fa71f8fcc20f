# mypy: ignore-errors
# The first stage. It travels compressed on the ssh command line, so it must parse on every Python from 2.7 on: what is
# too old has to say so itself. It makes the private dir and greets before it reads a byte of stdin, because OpenSSH
# sends stdin one round trip after the command (DESIGN section 1): that time is free.
#
# argv: marker, seconds to wait for the payload, hex of the wanted temp dir or "-", transport, the interpreters found.
# stdin: b"ZDP1", u32 size, zlib-compressed members of a zip archive, stored; the session's frames follow.
import gc
import os
import struct
import sys
import time

OLDEST = (3, 8)
NEED_FREE = 1 << 20  # bytes; room for a lease and for what a user's first small files need


def dumps(fields):
    try:
        import _json  # json itself takes 5 ms to import

        return "".join(_json.make_encoder(None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)(fields, 0))
    except Exception:
        import json

        return json.dumps(fields)


def say(marker, kind, fields):
    fields["type"] = kind
    body = dumps(fields).encode("ascii")
    # the marker stands before the first frame only; whoever comes later passes none
    data = struct.pack(">IIB", len(body), 0, 0) + body
    if marker:
        data = b"\n" + marker.encode("ascii") + b"\n" + data
    while data:
        data = data[os.write(1, data) :]


def fail(marker, status, stage, code, text, seen=()):
    say(marker, "stage_failed", {"stage": stage, "code": code, "text": text, "seen": list(seen)})
    sys.stdout.flush()
    os._exit(status)


def version_of(path):
    import subprocess

    code = "import sys;sys.stdout.write(str(sys.version_info[0])+chr(46)+str(sys.version_info[1])+chr(46)+str(sys.version_info[2]))"
    try:
        proc = subprocess.Popen([path, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = proc.communicate()
    except OSError as error:
        return str(error)
    if proc.returncode:
        return "exit status %d: %s" % (proc.returncode, err.decode("utf-8", "replace").strip()[-200:])
    return out.decode("ascii", "replace")


def newer(marker, rest):
    # this interpreter is too old: hand over to the first candidate that is not, or tell what was found
    seen = []
    for path in rest:
        found = version_of(path)
        seen.append([path, found])
        try:
            ok = tuple(int(part) for part in found.split(".")[:2]) >= OLDEST
        except ValueError:
            ok = False
        if ok:
            boot = "import sys;sys.path=[p for p in sys.path if p];import zlib,binascii;exec(zlib.decompress(binascii.a2b_base64(sys.argv[1])))"
            os.execvp(path, [path, "-c", boot] + sys.argv[1:6] + [path])
    fail(marker, 72, "interpreter", "too_old", "Python %d.%d.%d" % sys.version_info[:3], seen)


def why_not(parent):
    # a reason against making our directory in parent, or None
    try:
        info = os.stat(parent)
    except OSError as error:
        return error.strerror
    if info.st_mode & 0o002 and not info.st_mode & 0o1000:
        return "writable by everybody and not sticky: anybody could replace what we put there"
    free = os.statvfs(parent)
    if free.f_frsize * (free.f_bavail if os.geteuid() else free.f_bfree) < NEED_FREE:
        return "no space left: %d bytes free, %d needed" % (free.f_frsize * free.f_bavail, NEED_FREE)
    return None


def candidates(wanted):
    paths = [wanted, os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")]
    return [path for index, path in enumerate(paths) if path and path.startswith("/") and path not in paths[:index]]


#: the private dir, from before it is made until somebody else sees to it: a signal comes at any moment
OURS = []


def make_private_dir(marker, wanted):
    import fcntl

    rejected = []
    made = os.environ.get("ZERODEPLOY_DIR", "")  # by the shell, which has put this Python there
    if os.path.basename(made) != "zerodeploy-" + marker[:16]:
        made = ""
    for parent in [os.path.dirname(made)] if made else candidates(wanted):
        reason = None if made else why_not(parent)
        if reason is None:
            path = os.path.join(parent, "zerodeploy-" + marker[:16])
            OURS.append(path)
            try:
                if made:
                    os.environ.pop("PYTHONHOME", None)  # it is for this Python alone, whose starter sets it
                else:
                    os.mkdir(path, 0o700)
                os.chmod(path, 0o700)
                fd = os.open(os.path.join(path, "lease"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.write(fd, lease_text(marker))
                return path, fd, rejected
            except (OSError, IOError) as error:
                reason = error.strerror or str(error)
                if error.errno != 17:  # EEXIST: another one's
                    remove(path)
                OURS.remove(path)
        rejected.append([parent, reason])
    full = any("no space" in reason.lower() or "quota" in reason.lower() for _, reason in rejected)
    return fail(marker, 74 if full else 73, "private dir", "no_space" if full else "unusable", "no usable temp dir", rejected)


def lease_text(marker):
    # pid, its start time, boot id, session: what a later sweep needs to know whose directory this was
    start, boot = "-", "-"
    try:
        with open("/proc/self/stat") as stat:
            start = stat.read().rsplit(")", 1)[1].split()[19]
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except (OSError, IOError):
        pass
    return ("zerodeploy 1\n%d\n%s\n%s\n%s\n" % (os.getpid(), start, boot, marker)).encode("ascii")


def remove(path):
    import shutil

    shutil.rmtree(path, True)


def read_exactly(fd, size, deadline, copy=None):
    import select

    parts = []
    while size:
        if not select.select([fd], [], [], max(0, deadline - time.time()))[0]:
            raise EOFError("nothing arrived in time")
        part = os.read(fd, min(size, 1 << 16))
        if not part:
            raise EOFError("the link was closed")
        parts.append(part)
        size -= len(part)
        while copy is not None and part:
            part = part[os.write(copy, part) :]
    return b"".join(parts)


def load_payload(fd, deadline, copy=None):
    # the modules, from memory; what is read is passed on to the other process while it arrives
    import zlib

    head = read_exactly(fd, 8, deadline, copy)
    if head[:4] != b"ZDP1":
        raise ValueError("the payload lacks its beginning: does a login script read stdin? (%r)" % head)
    files = unzip(zlib.decompress(read_exactly(fd, struct.unpack(">I", head[4:])[0], deadline, copy)))
    module = type(sys)("zerodeploy_agent.importer")
    exec(compile(files["zerodeploy_agent/importer.py"], "agent.pyz/zerodeploy_agent/importer.py", "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    return module.install(files)


def unzip(data):
    # the members of a zip archive that stores them uncompressed, in order; zipfile takes 10 ms to import
    files, at = {}, 0
    while data[at : at + 4] == b"PK\3\4":
        size, names, extra = struct.unpack("<IHH", data[at + 22 : at + 30])
        name = data[at + 30 : at + 30 + names].decode("ascii")
        at += 30 + names + extra
        files[name] = data[at : at + size]
        at += size
    return files


def listen(transport, private_dir):
    # a listening socket for RPyC: its descriptor, port and path. Nothing at all for stdio
    if transport == "stdio":
        return -1, None, None
    import _socket  # the C half alone: socket.py takes 5 ms, and only a connection needs it

    if transport == "unix":
        path = os.path.join(private_dir, "rpyc.sock")
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(64)
        return listener.detach(), None, path
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    port = listener.getsockname()[1]
    return listener.detach(), port, None


def close_all(fds):
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def main(marker, seconds, wanted, transport, rest):
    gc.disable()  # until the first call: nothing that is made before becomes garbage
    began = time.time()
    if sys.version_info < OLDEST:
        newer(marker, rest[1:])
    import _signal  # the C half, as in keeper.py

    def stop(*_):
        for number in (1, 2, 15):  # another one is not to interrupt the removal
            _signal.signal(number, _signal.SIG_IGN)
        sys.exit(1)

    for number in (1, 2, 15):  # until the keeper has its own: whatever is there by then is removed
        _signal.signal(number, stop)
    worker = 0
    try:
        private_dir, lease, rejected = make_private_dir(marker, wanted)
        say(marker, "greeting", {
            "pid": os.getpid(), "python": "%d.%d.%d" % sys.version_info[:3], "executable": sys.executable or "",
            "implementation": sys.implementation.name, "private_dir": private_dir, "rejected": rejected,
            "seconds": {"private dir": time.time() - began},
        })  # fmt: skip
        os.environ["ZERODEPLOY_SESSION"] = marker  # sudo and its like may have dropped it
        os.environ["ZERODEPLOY_DIR"] = private_dir
        listener, port, path = listen(transport, private_dir)
        # from one process to two before anything heavy is imported: each loads what it needs at the same time
        down, up, stdout, stderr = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        link_in, link_out = os.dup(0), os.dup(1)  # dup gives non-inheritable copies: no child ever holds the link
        try:
            null = (os.open(os.devnull, os.O_RDWR),) * 2
        except OSError:  # a bare chroot
            null = os.pipe()
        os.dup2(null[0], 0)
        os.dup2(null[1], 1)
        close_all(set(null))
        worker = os.fork()
        if worker == 0:
            for number in (1, 2, 15):
                _signal.signal(number, _signal.default_int_handler if number == 2 else _signal.SIG_DFL)
            os.setsid()  # a session and process group of its own: signals to the group miss the keeper
            os.dup2(stdout[1], 1)
            os.dup2(stderr[1], 2)
            close_all((link_in, link_out, down[1], up[0], lease) + stdout + stderr)
            import threading  # noqa: F401 while the payload is on its way

            finder = load_payload(down[0], time.time() + seconds)
            from zerodeploy_agent import worker as side

            side.main(marker, private_dir, down[0], up[1], listener, finder)
            os._exit(0)
        close_all((down[0], up[1], stdout[1], stderr[1], listener))
        try:
            load_payload(link_in, time.time() + seconds, down[1])
        except Exception as error:
            os.kill(worker, 9)
            remove(private_dir)
            if isinstance(error, EOFError):
                os._exit(1)
            os.dup2(link_out, 1)
            fail("", 75, "payload", "broken", "%s: %s" % (type(error).__name__, error))
        from zerodeploy_agent import keeper

        keeper.Keeper(
            marker, private_dir, lease, worker, (link_in, link_out, down[1], up[0], stdout[0], stderr[0]), port, path
        ).run()
    except BaseException:
        if worker or os.getpid() == os.getppid():
            os.kill(worker, 9)
        for path in OURS:
            if os.path.isdir(path) and (worker or "finder" not in locals()):
                remove(path)
        raise


if __name__ == "__main__":
    main(
        sys.argv[2],
        float(sys.argv[3]),
        "" if sys.argv[4] == "-" else bytes(bytearray.fromhex(sys.argv[4])).decode("utf-8"),
        sys.argv[5],
        sys.argv[6:],
    )
