"""Jobs over several hosts: network namespaces with their own addresses, processes and ssh servers."""
