//! Kubernetes pods: containerd's CRI plugin, called as a kubelet calls it.

mod client;
mod pods;
mod streams;
