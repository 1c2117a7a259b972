"""No pandas for the processes under test, as where a user installs Blueberry.

sqlite-utils imports it wherever there is one, though nothing here uses it: half of the time that a daemon starts.
"""

raise ImportError("not for the processes under test")
