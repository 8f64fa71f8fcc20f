"""The jobs service over gRPC: a door before the supervisor of a state directory, which is a process of its own.

Needs grpclib and protobuf, and of zerodeploy nothing but the agent, so that it runs on hosts as it does here: Python 3.8+.
"""
