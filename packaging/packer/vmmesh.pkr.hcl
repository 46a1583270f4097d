# A golden image with vmmesh-agent and the Istio sidecar, for Amazon EC2; another source needs no change below `build`.
#
#   packer init . && packer validate . && packer build -var agent_package=… -var sidecar_package=… .
#
# What is in such an image, and how a machine joins that is made from it: docs/images.md.

packer {
  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = ">= 1.3.0"
    }
  }
}

variable "region" {
  type    = string
  default = "eu-central-1"
}

variable "agent_package" {
  description = "vmmesh-agent's deb, as scripts/build-packages makes it."
  type        = string
  default     = "vmmesh-agent.deb"
}

variable "sidecar_package" {
  description = "Istio's deb; its digest is published beside it. See to it before you build."
  type        = string
  default     = "istio-sidecar.deb"
}

source "amazon-ebs" "debian" {
  region        = var.region
  instance_type = "t3.small"
  ami_name      = "vmmesh-{{ timestamp }}"
  ssh_username  = "admin"

  source_ami_filter {
    owners      = ["136693071363"] # Debian
    most_recent = true
    filters = {
      name                = "debian-12-amd64-*"
      root-device-type    = "ebs"
      virtualization-type = "hvm"
    }
  }
}

build {
  sources = ["source.amazon-ebs.debian"]

  provisioner "file" {
    source      = var.agent_package
    destination = "/tmp/vmmesh-agent.deb"
  }

  provisioner "file" {
    source      = var.sidecar_package
    destination = "/tmp/istio-sidecar.deb"
  }

  # What all machines made from the image have in common. Never a join token: each of them gets its own, as user-data.
  provisioner "file" {
    source      = "${path.root}/config.yaml"
    destination = "/tmp/config.yaml"
  }

  provisioner "shell" {
    execute_command = "sudo env DEBIAN_FRONTEND=noninteractive sh -e '{{ .Path }}'"
    inline = [
      "cloud-init status --wait || :", # it may still be at apt
      "apt-get update",
      "apt-get install --yes --no-install-recommends /tmp/istio-sidecar.deb /tmp/vmmesh-agent.deb",
      "install --mode=0644 /tmp/config.yaml /etc/vmmesh-agent/config.yaml",
      "rm /tmp/istio-sidecar.deb /tmp/vmmesh-agent.deb /tmp/config.yaml",
      "vmmesh-agent check-config",
      "systemctl enable vmmesh-agent.service",
    ]
  }

  # What is not the agent's, and then the agent: image-clean comes last.
  provisioner "shell" {
    execute_command = "sudo sh -e '{{ .Path }}'"
    inline = [
      "cloud-init clean --logs --seed",
      "rm -f /etc/ssh/ssh_host_* /etc/hostname",
      "vmmesh-agent image-clean",
    ]
  }
}
