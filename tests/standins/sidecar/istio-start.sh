#!/bin/bash
# A stand-in for the start script of the istio-sidecar package: configures and starts the sidecar.
# packages.py fills in what differs between releases: @ROOT@, @APPEND@ and @CLEAN@.
set -e

export ISTIO_META_ISTIO_VERSION="@VERSION@"

# Both files are shell, read as root, and everything that they set is exported.
set -a
for config in "${ISTIO_SIDECAR_CONFIG:-@ROOT@/var/lib/istio/envoy/sidecar.env}" \
              "${ISTIO_CLUSTER_CONFIG:-@ROOT@/var/lib/istio/envoy/cluster.env}"; do
    if [[ -r $config ]]; then
        # shellcheck disable=SC1090
        . "$config"
    fi
done
set +a

ISTIO_BIN_BASE=${ISTIO_BIN_BASE:-/usr/local/bin}
ISTIO_LOG_DIR=${ISTIO_LOG_DIR:-@ROOT@/var/log/istio}
NS=${ISTIO_NAMESPACE:-default}
SVC=${ISTIO_SERVICE:-rawvm}
ISTIO_SVC_IP=${ISTIO_SVC_IP:-$(hostname --all-ip-addresses | cut -d ' ' -f 1)}
POD_NAME=${POD_NAME:-$(hostname -s)}

if [[ ${ISTIO_CUSTOM_IP_TABLES:-} != true ]]; then
    # The chains are worked out from the environment of this moment, those to remove as well.
    # shellcheck disable=SC2086
    "$ISTIO_BIN_BASE/pilot-agent" @CLEAN@
fi
if [[ ${1-} == clean ]]; then
    exit 0
fi
if [[ ${ISTIO_CUSTOM_IP_TABLES:-} != true && ${1-} != run ]]; then
    "$ISTIO_BIN_BASE/pilot-agent" istio-iptables
    if [[ ${1-} == init ]]; then
        exit 0
    fi
fi

EXEC_USER=${EXEC_USER:-istio-proxy}
if [[ ${ISTIO_INBOUND_INTERCEPTION_MODE:-} == TPROXY ]]; then
    EXEC_USER=root
fi

export PROV_CERT=${PROV_CERT-@ROOT@/etc/certs}
export OUTPUT_CERTS=${OUTPUT_CERTS-@ROOT@/etc/certs}
export CA_ADDR=${CA_ADDR:-istiod.${ISTIO_SYSTEM_NAMESPACE:-istio-system}.svc:${ISTIO_PILOT_PORT:-15012}}
export PROXY_CONFIG=${PROXY_CONFIG:-"
serviceCluster: $SVC
controlPlaneAuthPolicy: ${ISTIO_CP_AUTH:-MUTUAL_TLS}
"}

read -r -a flags <<< "${ISTIO_AGENT_FLAGS:-}"
if [[ $EXEC_USER == "${USER:-}" ]]; then
    # Started by hand as the right user: no redirection.
    INSTANCE_IP=$ISTIO_SVC_IP POD_NAME=$POD_NAME POD_NAMESPACE=$NS \
        "$ISTIO_BIN_BASE/pilot-agent" proxy "${flags[@]}"
else
    exec sudo -E -u "$EXEC_USER" -s /bin/bash -c "INSTANCE_IP=$ISTIO_SVC_IP POD_NAME=$POD_NAME POD_NAMESPACE=$NS exec $ISTIO_BIN_BASE/pilot-agent proxy ${flags[*]} 2@APPEND@ $ISTIO_LOG_DIR/istio.err.log @APPEND@ $ISTIO_LOG_DIR/istio.log"
fi
