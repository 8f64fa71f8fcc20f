"""The far side of zerodeploy: runs on the host, standard library only, Python 3.8+.

The near side imports the modules that both ends share (frames, messages, control, mux, streams, plain, fastrpc);
this package never imports ``zerodeploy``.
"""

PROTOCOL = 1  # the one wire version that this source speaks; a Session names the range that its sender accepts
